"""Attention of one head that is too wide for fused kernels: by matrix products, a frame at a time.

PyTorch has a kernel for such heads, but it goes through its sums in global memory.  Scores of a frame, in
fp32, are small beside what an autoencoder holds elsewhere, and products of matrices run at full speed.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.pixels import fuses
from kernels.selftest import error_share, first_sound, poisoned

# PyTorch's fast kernels take heads up to this width
WIDEST = 256
DTYPES = (torch.bfloat16, torch.float16)
# frames and tokens of a trial
TRIAL = (2, 130)
# of its result, relative to all of it: roundings of weights; a wrong token is off by 1 / 16
ALLOWED = 0.02

Op = Callable[[Tensor, Tensor, Tensor], Tensor]


def wide_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of frames' tokens (N, L, D)."""
    runs = q.is_cuda and q.dtype in DTYPES and q.shape[-1] > WIDEST and fuses(q)
    return (_sound(q.device, q.dtype, q.shape[-1]) if runs else fused)(q, k, v)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By PyTorch's kernels."""
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).squeeze(1)


def by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """On a GPU alone, and without derivatives."""
    out, scale = torch.empty_like(v), q.shape[-1] ** -0.5
    for queries, keys, values, sums in zip(q, k, v, out, strict=True):
        # scaled in fp32: queries would be rounded once more
        scores = torch.mm(queries, keys.mT, out_dtype=torch.float32).mul_(scale)
        torch.mm(scores.softmax(-1).to(values.dtype), values, out=sums)
    return out


@cache
def _sound(device: torch.device, dtype: torch.dtype, width: int) -> Op:
    """What to run on that GPU for heads of that width: the result is compared with that in fp64."""

    def check(op: Op) -> float:
        generator = torch.Generator(device).manual_seed(0)
        q, k, v = torch.randn(3, *TRIAL, width, generator=generator, device=device).to(dtype)
        with torch.no_grad(), poisoned():
            got = op(q, k, v)
        return error_share([got], [fused(q.double(), k.double(), v.double())], ALLOWED)

    return first_sound("wide_attention", {"products": by_products, "PyTorch": fused}, check)
