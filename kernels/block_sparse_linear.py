"""Sparse attention and the linear branch together, where that spares memory, else one by one.

Without derivatives, sparse attention's kernels for Hopper GPUs end each tile with its queries' linear branch
(kernels/linear_attention_hopper.py): no output is written and read again.  With gradients, in Triton on any
GPU, the linear branch's are added to the others as they are written.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import FunctionCtx

from kernels import block_sparse, linear_attention
from kernels.block_sparse import BLOCKS, Trial, sparse_attention
from kernels.block_sparse_int8 import are_differentiated, sparse_attention_int8
from kernels.selftest import error_share, first_sound, poisoned


class Settings(NamedTuple):
    """Sizes of blocks, a name in reference.FEATURE_MAPS, and whether the softmax attention is in 8 bits."""

    block_q: int
    block_k: int
    feature_map: str
    int8: bool


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    feature_map: str,
    weight: Tensor,
    bias: Tensor,
    *,
    block_q: int,
    block_k: int,
    int8: bool = False,
) -> Tensor:
    """sparse_attention, or with int8 sparse_attention_int8, plus linear_attention, of their arguments.

    q (B, N, L, D), k and v (B, N, S, D), block_index (B, N, query blocks, kept), weight (D, D), bias (D) ->
    (B, N, L, D).  Derivatives are those of the two, so there are none with int8.
    """
    block_sparse.check(q, k, v, block_index, block_q, block_k)
    linear_attention.check(q, k, v, weight, bias, None, feature_map)
    settings, form = Settings(block_q, block_k, feature_map, int8), separate
    has_tangent = any(unpack_dual(x).tangent is not None for x in (q, k, v, weight, bias))
    if q.is_cuda and weight.dtype == bias.dtype == q.dtype and not has_tangent:
        is_differentiated = are_differentiated(q, k, v, weight, bias)
        form = _sound(q.device, q.dtype, q.shape[-1], settings, is_differentiated)
    return form(q, k, v, block_index, weight, bias, settings)


def separate(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, weight: Tensor, bias: Tensor, settings: Settings
) -> Tensor:
    """One by one."""
    block_q, block_k, feature_map, int8 = settings
    attend = sparse_attention_int8 if int8 else sparse_attention
    sparse = attend(q, k, v, block_index, block_q=block_q, block_k=block_k)
    return linear_attention.linear_attention(q, k, v, feature_map, weight, bias, add=sparse)


def fused(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, weight: Tensor, bias: Tensor, settings: Settings
) -> Tensor:
    """By sparse attention's kernels for Hopper; for what `has_kernel` says."""
    from kernels import block_sparse_hopper, block_sparse_int8_hopper
    from kernels import block_sparse_int8_triton as int8
    from kernels import block_sparse_triton as sparse
    from kernels.linear_attention_triton import Branch, of_keys
    from kernels.tiles import tokens_first

    _, folded, vectors = of_keys(k, v, weight, settings.feature_map)
    branch = Branch(tokens_first(q), folded, vectors, bias.contiguous(), settings.feature_map)
    blocks = sparse.Blocks(block_index, *settings[:2])
    if settings.int8:
        form = int8.Eight(block_sparse_int8_hopper.FORMS[settings[:2]], fp8=True)
        return int8.attention(q, k, v, blocks, form, branch)
    return sparse.attention(q, k, v, blocks, block_sparse_hopper.FORMS[settings.block_q], branch)[0]


def has_backward(device: torch.device, dtype: torch.dtype, width: int, settings: Settings) -> bool:
    """Whether `together` runs there: where both do in Triton, and not in 8 bits."""
    from kernels.linear_attention_triton import DTYPES, HEAD_WIDTHS

    q = torch.empty(0, width, dtype=dtype, device=device)
    runs = block_sparse.runs_in_triton(q, *settings[:2]) and not settings.int8
    return runs and width in HEAD_WIDTHS and dtype in DTYPES


def together(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, weight: Tensor, bias: Tensor, settings: Settings
) -> Tensor:
    """With one backward; for what `has_backward` says."""
    return _Together.apply(q, k, v, weight, bias, block_index, settings)[0]


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, block_index: Tensor, settings: Settings
    ) -> tuple[Tensor, ...]:
        from kernels import linear_attention_triton

        sparse, lse = block_sparse.sparse_forward(q, k, v, block_index, *settings[:2])
        out = linear_attention_triton.forward(q, k, v, weight, bias, sparse, settings.feature_map)
        return *out, sparse, lse

    @staticmethod
    def setup_context(
        ctx: FunctionCtx, inputs: tuple[Tensor | Settings, ...], output: tuple[Tensor, ...]
    ) -> None:
        *saved, _, block_index, ctx.settings = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*saved, *output[1:], block_index)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        from kernels import linear_attention_grad_triton

        *saved, sparse, lse, block_index = ctx.saved_tensors
        block_q, block_k, feature_map, _ = ctx.settings
        onto = block_sparse.sparse_backward((*saved[:3], sparse, lse), block_index, grad, block_q, block_k)
        is_trained = any(ctx.needs_input_grad[3:5])
        grads = linear_attention_grad_triton.backward(*saved, grad, feature_map, is_trained, onto)
        return *(None if x is None else x.to(grad.dtype) for x in grads), None, None


def has_kernel(device: torch.device, dtype: torch.dtype, width: int, settings: Settings) -> bool:
    """Whether `fused` runs there: with fewer queries a block, two programs share what memory there is."""
    from kernels.linear_attention_triton import HEAD_WIDTHS
    from kernels.tiles import HAS_GLUON

    is_hopper = torch.cuda.get_device_capability(device) == (9, 0) and HAS_GLUON
    fits = settings.block_q == 128 and settings.block_k in ((64,) if settings.int8 else BLOCKS)
    return is_hopper and fits and width in HEAD_WIDTHS and dtype == torch.bfloat16


@cache
def _sound(
    device: torch.device, dtype: torch.dtype, width: int, settings: Settings, is_differentiated: bool
) -> Callable[..., Tensor]:
    """What to run on that GPU: what spares memory, if it is there and right about a small example."""
    if is_differentiated:
        forms = {"one backward": together} if has_backward(device, dtype, width, settings) else {}
    else:
        forms = {"one kernel": fused} if has_kernel(device, dtype, width, settings) else {}
    if not forms:
        return separate

    def check(form: Callable[..., Tensor]) -> float:
        trial = _Trial(device, dtype, width, settings)
        got, truth = trial.results(form, is_differentiated), trial.truths(is_differentiated)
        # as of the linear branch, the larger part; the smaller may lose 4 % of itself, in 8 bits
        return error_share(got, truth, 0.016)

    return first_sound("sparse-linear attention", forms | {"one by one": separate}, check)


class _Trial(Trial):
    """That of sparse attention, with a projection."""

    def __init__(self, device: torch.device, dtype: torch.dtype, width: int, settings: Settings):
        super().__init__(device, dtype, width, *settings[:2])
        generator = torch.Generator(device).manual_seed(0)
        sizes = ((width, width), (width,))
        weight, bias = (torch.randn(size, generator=generator, device=device) for size in sizes)
        # a bias of the size of the rest
        self.inputs = [self.q, self.k, self.v, weight.to(dtype), (bias / 4).to(dtype)]
        self.settings = settings

    def results(self, form: Callable[..., Tensor], is_differentiated: bool) -> tuple[Tensor, ...]:
        """A form's output and, if it is differentiated, gradients of all inputs."""

        def call(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return form(q, k, v, self.index, weight, bias, self.settings)

        with poisoned():
            return _with_gradients(call, self.inputs, self.g) if is_differentiated else (call(*self.inputs),)

    def truths(self, is_differentiated: bool) -> tuple[Tensor, ...]:
        """The same by the twins in fp64."""
        truth, feature_map = self.truth(), self.settings.feature_map
        out, *grads = _with_gradients(
            lambda *x: linear_attention.plain(*x, *truth["forward"], feature_map),
            [x.double() for x in self.inputs],
            self.g.double(),
        )
        for grad, more in zip(grads[:3], (*truth["queries"], *truth["keys"]), strict=True):
            grad += more
        return (out, *grads) if is_differentiated else (out,)


def _with_gradients(fn: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = fn(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)
