"""Attention that can be differentiated both ways: backward, and forward along tangents (dual numbers).

PyTorch's fused attention kernels have no forward-mode rule.  This op computes the output and its tangent in
one pass over the keys, in Triton on a GPU (kernels/flash_jvp_triton.py), by kernels/reference.py on a CPU.
"""

import os
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import FunctionCtx

from kernels import reference


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over every key.

    q (B, N, L, D), k and v (B, N, S, D), one dtype -> (B, N, L, D) in that dtype.  Any of the three may carry
    a forward-mode tangent; those that carry none cost nothing.  The tangent of the result has no graph: it
    cannot be differentiated again.  On a GPU: bf16, fp16 or fp32, and D 32, 64 or 128; else ValueError.
    """
    tangents = ((unpack_dual(x).tangent, x.dtype) for x in (q, k, v))
    # PyTorch's rules may answer in another dtype, which a kernel would misread
    tangents = (None if tangent is None else tangent.to(dtype) for tangent, dtype in tangents)
    return _Attention.apply(q, k, v, *tangents)[0]


@torch.library.custom_op("turbodiffusion::attention_tangent", mutates_args=())
def attention_tangent(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse and do by a kernel; an operator of PyTorch's, so that it appears in a traced tangent pass."""
    return _implementation(q).attention(q, k, v, dq, dk, dv)


@attention_tangent.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, L, D), empty = q.shape, q.new_empty
    # tokens first in memory, as the kernels write
    o, do = (empty(B, L, N, D).transpose(1, 2) for _ in range(2))
    return o, empty(B, N, L, dtype=torch.float32), do


class _Attention(torch.autograd.Function):
    """The tangents are plain inputs, so that one kernel sees them beside the primals."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        tangents = dq, dk, dv
        if _implementation(q) is not reference and any(x is not None for x in tangents):
            return tuple(attention_tangent(q, k, v, *tangents))
        o, lse, do = _implementation(q).attention(q, k, v, *tangents)
        return o.to(q.dtype), lse, None if do is None else do.to(q.dtype)

    @staticmethod
    def setup_context(
        ctx: FunctionCtx, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor, Tensor | None]
    ) -> None:
        o, lse, ctx.tangent = output
        ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
        ctx.save_for_backward(*inputs[:3], o, lse)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        grads = _implementation(q).attention_backward(q, k, v, o, lse, grad)
        return *(x.to(q.dtype) for x in grads), None, None, None

    @staticmethod
    def jvp(ctx: FunctionCtx, *_: Tensor | None) -> tuple[Tensor, None, None]:
        return ctx.tangent, None, None


def _implementation(x: Tensor) -> ModuleType:
    """The module to run: Triton, which only GPU machines have, is imported when it is first needed."""
    if x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        from kernels import flash_jvp_triton

        return flash_jvp_triton
    return reference
