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


class _Attention(torch.autograd.Function):
    """The tangents are plain inputs, so that one kernel sees them beside the primals."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        o, lse, do = _implementation(q).attention(q, k, v, dq, dk, dv)
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
