"""Attention in which each block of queries sees only the blocks of keys in its list; the list is held fixed.

In Triton on a GPU (kernels/block_sparse_triton.py), for the sizes its kernels take.  For others PyTorch's
dense kernel runs there under a mask, while that is small; else, and on a CPU, kernels/reference.py does.
"""

import os
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import FunctionCtx

from kernels import reference
from kernels.selftest import error_share, first_sound, poisoned

# what the kernels take
BLOCKS = (32, 64, 128)
HEAD_WIDTHS = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# numbers of a mask for the sizes that they do not take, 2 GiB in 16 bits
LARGEST_MASK = 1 << 30


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, *, block_q: int, block_k: int
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys of the listed blocks alone.

    q (B, N, L, D), k and v (B, N, S, D), one dtype; block_index (B, N, query blocks, kept), int32, ascending,
    as from block_map -> (B, N, L, D) in that dtype.  Any of q, k and v may carry a forward-mode tangent.
    Raises ValueError for shapes or dtypes that do not fit each other.
    """
    check(q, k, v, block_index, block_q, block_k)
    tangents = [unpack_dual(x).tangent for x in (q, k, v)]
    if not runs_in_triton(q, block_q, block_k):
        is_small = q.shape[:3].numel() * k.shape[2] <= LARGEST_MASK
        if q.is_cuda and is_small and all(x is None for x in tangents):
            return masked_attention(q, k, v, block_index, block_q, block_k)
        o, _ = reference.sparse_attention(q, k, v, block_index, block_q=block_q, block_k=block_k)
        return o.to(q.dtype)
    if any(x is not None for x in tangents):
        # one kernel for every choice of tangents; PyTorch's rules may answer in a dtype that it would misread
        tangents = [
            torch.zeros_like(x) if tangent is None else tangent.to(x.dtype)
            for x, tangent in zip((q, k, v), tangents, strict=True)
        ]
    return _SparseAttention.apply(q, k, v, *tangents, block_index, block_q, block_k)[0]


@torch.library.custom_op("turbodiffusion::sparse_attention", mutates_args=())
def sparse_forward(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    """o and lse by the kernels; an operator of PyTorch's, so that checkpointing can keep its results."""
    kernels, form = _kernels(), _form("forward", q, block_q, block_k)
    return kernels.attention(q, k, v, kernels.Blocks(block_index, block_q, block_k), form)


def sparse_backward(
    saved: tuple[Tensor, ...], block_index: Tensor, grad: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients along q, k and v, from grad, that of o, by the kernels; saved: q, k, v, o and lse."""
    kernels = _kernels()
    forms = (_form(kind, saved[0], block_q, block_k) for kind in ("queries", "keys"))
    return kernels.backward(saved, grad, kernels.Blocks(block_index, block_q, block_k), *forms)


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
        if dq is None:
            return *sparse_forward(q, k, v, block_index, block_q, block_k), None
        kernels, form = _kernels(), _form("tangent", q, block_q, block_k)
        return kernels.tangent((q, k, v), (dq, dk, dv), kernels.Blocks(block_index, block_q, block_k), form)

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
        return *sparse_backward(saved, block_index, grad, *ctx.sizes), *(None,) * 6

    @staticmethod
    def jvp(ctx: FunctionCtx, *_: Tensor | None) -> tuple[Tensor, None, None]:
        return ctx.tangent, None, None


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, block_q: int, block_k: int
) -> Tensor:
    """sparse_attention as dense attention under a mask of L x S: on short sequences faster than the twin."""
    length, keys = q.shape[2], k.shape[2]
    is_listed = torch.zeros(*block_index.shape[:3], -(-keys // block_k), dtype=torch.bool, device=q.device)
    rows = is_listed.scatter_(-1, block_index.long(), True).repeat_interleave(block_q, 2)[:, :, :length]
    mask = rows.repeat_interleave(block_k, 3)[..., :keys]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def runs_in_triton(q: Tensor, block_q: int, block_k: int) -> bool:
    """Whether the kernels take such queries and blocks, and q is where they run."""
    fits = {block_q, block_k} <= {*BLOCKS} and q.shape[-1] in HEAD_WIDTHS and q.dtype in DTYPES
    return fits and (q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def check(q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, block_q: int, block_k: int) -> None:
    """Raise ValueError unless the arguments of sparse attention fit each other."""
    reference.check_shapes(q, k, v)
    reference.check_dtypes(q, k, v)
    lists = (*q.shape[:2], -(-q.shape[2] // block_q))
    most = -(-k.shape[2] // block_k)
    if block_index.shape[:-1] != lists or not 0 < block_index.shape[-1] <= most:
        raise ValueError(
            f"got a list of shape {tuple(block_index.shape)} for blocks of {block_q} queries and {block_k} "
            f"keys; wanted {lists} and from 1 to {most} key blocks"
        )
    if block_index.dtype != torch.int32:
        raise ValueError(f"got a list in {block_index.dtype}, wanted torch.int32")


def _form(kind: str, q: Tensor, block_q: int, block_k: int) -> NamedTuple:
    """How to run the kernel of that kind, of those that block_sparse_triton.forms_for knows, where q is."""
    if q.is_cuda:
        return _sound_form(kind, q.device, q.dtype, q.shape[-1], block_q, block_k)
    return _kernels().forms_for(kind, q.dtype, 0, block_q, block_k)[0]


@cache
def _sound_form(
    kind: str, device: torch.device, dtype: torch.dtype, width: int, block_q: int, block_k: int
) -> NamedTuple:
    """The first form that is right about a small example on that GPU."""
    kernels, trial = _kernels(), Trial(device, dtype, width, block_q, block_k)
    major, minor = torch.cuda.get_device_capability(device)
    forms = kernels.forms_for(kind, dtype, 10 * major + minor, block_q, block_k)
    usual = {name: kernels.forms_for(name, dtype, 0, block_q, block_k)[0] for name in kernels.PORTABLE}
    # what the kernels round is rounded by half of eps at most; fp32's sums are in another order, and longer
    allowed = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 1)
    return first_sound(
        f"sparse attention ({kind})",
        {str(tuple(form)): form for form in forms},
        lambda form: error_share(trial.run(kind, usual | {kind: form}), trial.truth()[kind], allowed),
    )


class Trial:
    """Three blocks of queries and nine of keys, the last ones half as long, and their lists."""

    HEADS = 16
    LISTS = ((0, 1, 2, 3, 5, 8), (0, 2, 4, 6, 7, 8), (1, 3, 4, 5, 6, 7))

    def __init__(self, device: torch.device, dtype: torch.dtype, width: int, block_q: int, block_k: int):
        generator = torch.Generator(device).manual_seed(0)
        self.block_q, self.block_k = block_q, block_k
        index = torch.tensor(self.LISTS, dtype=torch.int32, device=device)
        self.index = index.expand(1, self.HEADS, -1, -1)
        self.q, self.dq, self.g, self.k, self.v, self.dk, self.dv = (
            torch.randn(1, self.HEADS, length, width, generator=generator, device=device).to(dtype)
            for length in [5 * block_q // 2] * 3 + [17 * block_k // 2] * 4
        )

    def run(self, kind: str, forms: Mapping[str, NamedTuple]) -> tuple[Tensor, ...]:
        """What the kernel of that kind computes, those of the other kinds in their forms."""
        kernels, primals = _kernels(), (self.q, self.k, self.v)
        blocks = kernels.Blocks(self.index, self.block_q, self.block_k)
        with poisoned():
            if kind == "tangent":
                return kernels.tangent(primals, (self.dq, self.dk, self.dv), blocks, forms[kind])[2:]
            o, lse = kernels.attention(*primals, blocks, forms["forward"])
            if kind == "forward":
                return (o,)
            saved = (*primals, o, lse)
            grads = kernels.backward(saved, self.g, blocks, forms["queries"], forms["keys"])
            return grads[:1] if kind == "queries" else grads[1:]

    def truth(self) -> dict[str, tuple[Tensor, ...]]:
        """The same for every kind, by the twin of dense attention in fp64, a list at a time."""
        q, k, v, dq, dk, dv, g = (
            x.double() for x in (self.q, self.k, self.v, self.dq, self.dk, self.dv, self.g)
        )
        o, do, gq, gk, gv = (torch.zeros_like(x) for x in (q, q, q, k, v))
        every = torch.arange(k.shape[2], device=k.device)
        for block, chosen in enumerate(self.LISTS):
            rows = slice(block * self.block_q, (block + 1) * self.block_q)
            keys = torch.cat([every[i * self.block_k : (i + 1) * self.block_k] for i in chosen])
            inputs = [q[:, :, rows], k[:, :, keys], v[:, :, keys]]
            tangents = [dq[:, :, rows], dk[:, :, keys], dv[:, :, keys]]
            o[:, :, rows], lse, do[:, :, rows] = reference.attention(*inputs, *tangents)
            gq[:, :, rows], more_gk, more_gv = reference.attention_backward(
                *inputs, o[:, :, rows], lse, g[:, :, rows]
            )
            gk[:, :, keys] += more_gk
            gv[:, :, keys] += more_gv
        return {"forward": (o,), "tangent": (do,), "queries": (gq,), "keys": (gk, gv)}


def _kernels() -> ModuleType:
    """Triton, which only GPU machines have, is imported when it is first needed."""
    from kernels import block_sparse_triton

    return block_sparse_triton
