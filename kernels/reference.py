"""Plain-PyTorch twins of the kernels: what the kernels are tested against, and what runs on a CPU."""

import math

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """softmax(q k^T / sqrt(D)) v, its row-wise log-sum-exp, and its derivative along (dq, dk, dv).

    q, dq (B, N, L, D); k, v, dk, dv (B, N, S, D); an absent tangent is zero -> o (B, N, L, D),
    lse (B, N, L), do like o, or None when no tangent is given.  All in fp32, or fp64 for fp64 inputs.
    """
    q, k, v, dq, dk, dv = (None if x is None else _widen(x) for x in (q, k, v, dq, dk, dv))
    scale = 1 / math.sqrt(q.shape[-1])
    scores = scale * q @ k.mT
    p = scores.softmax(-1)
    o, lse = p @ v, scores.logsumexp(-1)
    if dq is None and dk is None and dv is None:
        return o, lse, None
    slope = torch.zeros_like(p)
    if dq is not None:
        slope += scale * dq @ k.mT
    if dk is not None:
        slope += scale * q @ dk.mT
    do = (p * (slope - (p * slope).sum(-1, keepdim=True))) @ v
    return o, lse, do if dv is None else do + p @ dv


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention's o along q, k and v, from what it returned; shapes and dtypes as there."""
    q, k, v, o, grad = (_widen(x) for x in (q, k, v, o, grad))
    scale = 1 / math.sqrt(q.shape[-1])
    p = (scale * q @ k.mT - lse.unsqueeze(-1)).exp()
    slope = scale * p * (grad @ v.mT - (grad * o).sum(-1, keepdim=True))
    return slope @ k, slope.mT @ q, p.mT @ grad


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
