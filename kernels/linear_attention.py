"""The linear branch of sparse-linear attention with its projection: Triton on a GPU, else plain PyTorch."""

import os
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import FunctionCtx
from torch.autograd.functional import jvp

from kernels import reference
from kernels.selftest import error_share, first_sound, poisoned


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, feature_map: str, weight: Tensor, bias: Tensor, add: Tensor | None = None
) -> Tensor:
    """Linear attention over every key, projected: reference.linear_attention(...) W^T + bias, and + add.

    q, add (B, N, L, D), k and v (B, N, S, D), weight (D, D), bias (D) -> (B, N, L, D) in q's dtype, tokens
    first in memory on a GPU.  Differentiable both ways; the kernels have no tangent of weight or bias, with
    which PyTorch's operators run.
    """
    inputs = (q, k, v, weight, bias, add)
    check(*inputs, feature_map)
    return _implementation(*inputs, feature_map)(*inputs, feature_map)


def plain(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, feature_map: str
) -> Tensor:
    """The twin: what kernels are held to, and what runs wherever they do not."""
    out = F.linear(reference.linear_attention(q, k, v, feature_map).to(q.dtype), weight, bias)
    return out if add is None else add.to(q.dtype) + out


def fused(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, feature_map: str
) -> Tensor:
    """By kernels/linear_attention_triton.py, for tangents and gradients those of that name beside it.

    Raises ValueError for a tangent of weight or bias.
    """
    *tangents, d_weight, d_bias, d_add = (_tangent(x) for x in (q, k, v, weight, bias, add))
    if d_weight is not None or d_bias is not None:
        raise ValueError("the kernels have no tangent of the projection; plain has")
    if any(x is not None for x in (*tangents, d_add)):
        # one kernel for every choice of tangents; PyTorch's rules may answer in a dtype that it would misread
        tangents = [
            torch.zeros_like(x) if tangent is None else tangent.to(x.dtype)
            for x, tangent in zip((q, k, v), tangents, strict=True)
        ]
    return _Fused.apply(q, k, v, weight, bias, add, *tangents, d_add, feature_map)[0]


class _Fused(torch.autograd.Function):
    """The tangents are plain inputs, so that one kernel sees them beside the primals."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor,
        bias: Tensor,
        add: Tensor | None,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        d_add: Tensor | None,
        feature_map: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        if dq is None:
            from kernels import linear_attention_triton

            return *linear_attention_triton.forward(q, k, v, weight, bias, add, feature_map), None
        from kernels import linear_attention_tangent_triton

        return linear_attention_tangent_triton.tangent(
            (q, k, v), (dq, dk, dv), weight, bias, add, d_add, feature_map
        )

    @staticmethod
    def setup_context(
        ctx: FunctionCtx, inputs: tuple[Tensor | str | None, ...], output: tuple[Tensor | None, ...]
    ) -> None:
        add, ctx.feature_map = inputs[5], inputs[-1]
        _, *saved, ctx.tangent = output
        ctx.add_dtype = None if add is None else add.dtype
        ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
        ctx.save_for_backward(*inputs[:4], *saved)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        from kernels import linear_attention_grad_triton

        is_trained = any(ctx.needs_input_grad[3:5])
        grads = linear_attention_grad_triton.backward(*ctx.saved_tensors, grad, ctx.feature_map, is_trained)
        add_grad = None if ctx.add_dtype is None else grad.to(ctx.add_dtype)
        return *(None if x is None else x.to(grad.dtype) for x in grads), add_grad, *(None,) * 5

    @staticmethod
    def jvp(ctx: FunctionCtx, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return ctx.tangent, *(None,) * 4


def _tangent(x: Tensor | None) -> Tensor | None:
    return None if x is None else unpack_dual(x).tangent


def check(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, feature_map: str
) -> None:
    """Raise ValueError unless the arguments of linear attention fit each other."""
    D = q.shape[-1]
    reference.check_shapes(q, k, v)
    if weight.shape != (D, D) or bias.shape != (D,) or (add is not None and add.shape != q.shape):
        raise ValueError(
            f"got weight {tuple(weight.shape)}, bias {tuple(bias.shape)}, add "
            f"{None if add is None else tuple(add.shape)}; wanted ({D}, {D}), ({D},) and {tuple(q.shape)}"
        )
    if feature_map not in reference.FEATURE_MAPS:
        raise ValueError(
            f"got feature_map={feature_map!r}, wanted one of {', '.join(reference.FEATURE_MAPS)}"
        )


def _implementation(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, feature_map: str
) -> Callable[..., Tensor]:
    """Triton, which only GPU machines have, is imported when it is first needed."""
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return plain
    from kernels import linear_attention_triton as kernels

    # add may have another dtype
    is_supported = q.shape[-1] in kernels.HEAD_WIDTHS and q.dtype in kernels.DTYPES
    is_supported &= all(x.dtype == q.dtype for x in (k, v, weight, bias))
    if not is_supported or any(_tangent(x) is not None for x in (weight, bias)):
        return plain
    if not q.is_cuda:
        return fused
    is_dual = any(_tangent(x) is not None for x in (q, k, v, add))
    return _sound(q.device, q.dtype, q.shape[-1], feature_map, is_dual)


@cache
def _sound(
    device: torch.device, dtype: torch.dtype, width: int, feature_map: str, is_dual: bool
) -> Callable[..., Tensor]:
    """What to run on that GPU: outputs and gradients, or tangents, are compared with the twin's in fp64."""

    def differentiate(
        form: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, tangents: list[Tensor]
    ) -> Sequence[Tensor]:
        if not is_dual:
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = form(*leaves, feature_map)
            return [out, *torch.autograd.grad(out, leaves, grad)]
        primals, rest = inputs[:3], inputs[3:]
        # no dual numbers here: the caller is in the middle of some, and they do not nest
        if form is fused:
            from kernels import linear_attention_tangent_triton as kernels

            return kernels.tangent(primals, tangents, *rest, None, feature_map)[::4]
        return jvp(lambda *x: form(*x, *rest, feature_map), tuple(primals), tuple(tangents))

    def check(form: Callable[..., Tensor]) -> float:
        generator = torch.Generator(device).manual_seed(0)
        # a ragged length, of several tiles
        tokens = (2, 2, 300, width)
        sizes = [tokens] * 3 + [(width, width), (width,)] + [tokens] * 5
        drawn = [torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes]
        with poisoned():
            got = differentiate(form, drawn[:6], drawn[6], drawn[7:])
        wide = [x.double() for x in drawn]
        truth = differentiate(plain, wide[:6], wide[6], wide[7:])
        # a few roundings of bf16, or of TF32 where a user lets fp32 be that; one wrong token is off by more
        return error_share(got, truth, 0.016)

    return first_sound("linear attention", {"Triton": fused, "PyTorch": plain}, check)
