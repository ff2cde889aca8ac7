"""Attention in which each block of queries sees only the blocks of keys in its list; the list is held fixed.

In Triton on a GPU (kernels/block_sparse_triton.py), for the sizes its kernels take; else, and on a CPU, by
kernels/reference.py.
"""

import os
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import FunctionCtx

from kernels import reference

# what the kernels take
BLOCKS = (32, 64, 128)
HEAD_WIDTHS = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, *, block_q: int, block_k: int
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys of the listed blocks alone.

    q (B, N, L, D), k and v (B, N, S, D), one dtype; block_index (B, N, query blocks, kept), int32, ascending,
    as from block_map -> (B, N, L, D) in that dtype.  Any of q, k and v may carry a forward-mode tangent.
    Raises ValueError for shapes or dtypes that do not fit each other.
    """
    check(q, k, v, block_index, block_q, block_k)
    if not runs_in_triton(q, block_q, block_k):
        return reference.sparse_attention(q, k, v, block_index, block_q=block_q, block_k=block_k)[0].to(
            q.dtype
        )
    tangents = [unpack_dual(x).tangent for x in (q, k, v)]
    if any(x is not None for x in tangents):
        # one kernel for every choice of tangents; PyTorch's rules may answer in a dtype that it would misread
        tangents = [
            torch.zeros_like(x) if tangent is None else tangent.to(x.dtype)
            for x, tangent in zip((q, k, v), tangents, strict=True)
        ]
    return _SparseAttention.apply(q, k, v, *tangents, block_index, block_q, block_k)[0]


class _SparseAttention(torch.autograd.Function):
    """The tangents are plain inputs, so that one kernel sees them beside the primals."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        block_index: Tensor,
        block_q: int,
        block_k: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        kernels = _kernels()
        blocks = kernels.Blocks(block_index, block_q, block_k)
        if dq is None:
            return *kernels.attention(q, k, v, blocks), None
        return kernels.tangent((q, k, v), (dq, dk, dv), blocks)

    @staticmethod
    def setup_context(
        ctx: FunctionCtx,
        inputs: tuple[Tensor | int | None, ...],
        output: tuple[Tensor, Tensor, Tensor | None],
    ) -> None:
        o, lse, ctx.tangent = output
        ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
        ctx.sizes = inputs[7:]
        ctx.save_for_backward(*inputs[:3], o, lse, inputs[6])

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, block_index = ctx.saved_tensors
        kernels = _kernels()
        return *kernels.backward(saved, grad, kernels.Blocks(block_index, *ctx.sizes)), *(None,) * 6

    @staticmethod
    def jvp(ctx: FunctionCtx, *_: Tensor | None) -> tuple[Tensor, None, None]:
        return ctx.tangent, None, None


def runs_in_triton(q: Tensor, block_q: int, block_k: int) -> bool:
    """Whether the kernels take such queries and blocks, and q is where they run."""
    fits = {block_q, block_k} <= {*BLOCKS} and q.shape[-1] in HEAD_WIDTHS and q.dtype in DTYPES
    return fits and (q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def check(q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, block_q: int, block_k: int) -> None:
    """Raise ValueError unless the arguments of sparse attention fit each other."""
    if k.shape != v.shape or k.shape != (*q.shape[:2], k.shape[2], q.shape[3]) or 0 in k.shape:
        raise ValueError(
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; wanted k like v, "
            "with q's batch, heads and width, and at least one key"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"got q in {q.dtype}, k in {k.dtype}, v in {v.dtype}; wanted one dtype")
    lists = (*q.shape[:2], -(-q.shape[2] // block_q))
    most = -(-k.shape[2] // block_k)
    if block_index.shape[:-1] != lists or not 0 < block_index.shape[-1] <= most:
        raise ValueError(
            f"got a list of shape {tuple(block_index.shape)} for blocks of {block_q} queries and {block_k} "
            f"keys; wanted {lists} and from 1 to {most} key blocks"
        )
    if block_index.dtype != torch.int32:
        raise ValueError(f"got a list in {block_index.dtype}, wanted torch.int32")


def _kernels() -> ModuleType:
    """Triton, which only GPU machines have, is imported when it is first needed."""
    from kernels import block_sparse_triton

    return block_sparse_triton
