"""The linear branch of sparse-linear attention with its projection: Triton on a GPU, else plain PyTorch."""

import os
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import FunctionCtx

from kernels import reference
from kernels.selftest import error_share, first_sound, poisoned


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, feature_map: str, weight: Tensor, bias: Tensor, add: Tensor | None = None
) -> Tensor:
    """Linear attention over every key, projected: reference.linear_attention(...) W^T + bias, and + add.

    q, add (B, N, L, D), k and v (B, N, S, D), weight (D, D), bias (D) -> (B, N, L, D) in q's dtype, tokens
    first in memory on a GPU.  Differentiable both ways: kernels have gradients, and any tangent is PyTorch's.
    """
    inputs = (q, k, v, weight, bias, add)
    _check(*inputs)
    if feature_map not in reference.FEATURE_MAPS:
        raise ValueError(
            f"got feature_map={feature_map!r}, wanted one of {', '.join(reference.FEATURE_MAPS)}"
        )
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
    """By kernels/linear_attention_triton.py."""
    return _Fused.apply(q, k, v, weight, bias, add, feature_map)[0]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, feature_map: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from kernels import linear_attention_triton

        return linear_attention_triton.forward(q, k, v, weight, bias, add, feature_map)

    @staticmethod
    def setup_context(
        ctx: FunctionCtx, inputs: tuple[Tensor | str | None, ...], output: tuple[Tensor, ...]
    ) -> None:
        *_, add, ctx.feature_map = inputs
        ctx.add_dtype = None if add is None else add.dtype
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:4], *output[1:])

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        from kernels import linear_attention_triton

        grads = linear_attention_triton.backward(*ctx.saved_tensors, grad, ctx.feature_map)
        dtype = grad.dtype
        add_grad = None if ctx.add_dtype is None else grad.to(ctx.add_dtype)
        return *(x.to(dtype) for x in grads), add_grad, None


def _check(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None) -> None:
    D = q.shape[-1]
    reference.check_shapes(q, k, v)
    if weight.shape != (D, D) or bias.shape != (D,) or (add is not None and add.shape != q.shape):
        raise ValueError(
            f"got weight {tuple(weight.shape)}, bias {tuple(bias.shape)}, add "
            f"{None if add is None else tuple(add.shape)}; wanted ({D}, {D}), ({D},) and {tuple(q.shape)}"
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
    given = (x for x in (q, k, v, weight, bias, add) if x is not None)
    if not is_supported or any(unpack_dual(x).tangent is not None for x in given):
        return plain
    return _sound(q.device, q.dtype, q.shape[-1], feature_map) if q.is_cuda else fused


@cache
def _sound(device: torch.device, dtype: torch.dtype, width: int, feature_map: str) -> Callable[..., Tensor]:
    """What to run on that GPU: outputs and gradients are compared with the twin's in fp64."""

    def differentiate(form: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = form(*leaves, feature_map)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    def check(form: Callable[..., Tensor]) -> float:
        generator = torch.Generator(device).manual_seed(0)
        # a ragged length, of several tiles
        sizes = [(2, 2, 300, width)] * 3 + [(width, width), (width,)] + [(2, 2, 300, width)] * 2
        drawn = (torch.randn(size, generator=generator, device=device) for size in sizes)
        *inputs, grad = (x.to(dtype) for x in drawn)
        with poisoned():
            got = differentiate(form, inputs, grad)
        truth = differentiate(plain, [x.double() for x in inputs], grad.double())
        # a few roundings of bf16, or of TF32 where a user lets fp32 be that; one wrong token is off by more
        return error_share(got, truth, 0.016)

    return first_sound("linear attention", {"Triton": fused, "PyTorch": plain}, check)
