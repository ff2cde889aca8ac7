"""Plain-PyTorch twins of the kernels: what the kernels are tested against, and what runs on a CPU."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.utils.checkpoint import checkpoint

# what linear attention sees of queries and keys: nowhere negative, so that the weights of a row sum to one
FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(F.softmax, dim=-1),
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
}
LINEAR_EPS = 1e-5
# of what is rounded, so that a block of zeros can be divided by its largest number
TINY = 1e-12
E4M3_MAX = 448
# about as many numbers as sparse attention holds at once, 256 MiB in fp32
WORKSPACE = 1 << 26


def attention(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """softmax(q k^T / sqrt(D)) v, its row-wise log-sum-exp, and its derivative along (dq, dk, dv).

    q, dq (B, N, L, D); k, v, dk, dv (B, N, S, D); an absent tangent is zero -> o (B, N, L, D),
    lse (B, N, L), do like o, or None when no tangent is given.  All in fp32, or fp64 for fp64 inputs.
    """
    q, k, v, dq, dk, dv = (None if x is None else widen(x) for x in (q, k, v, dq, dk, dv))
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
    q, k, v, o, grad = (widen(x) for x in (q, k, v, o, grad))
    scale = 1 / math.sqrt(q.shape[-1])
    p = (scale * q @ k.mT - lse.unsqueeze(-1)).exp()
    slope = scale * p * (grad @ v.mT - (grad * o).sum(-1, keepdim=True))
    return slope @ k, slope.mT @ q, p.mT @ grad


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k and v are those of an attention."""
    if (
        k.shape != v.shape
        or k.shape != (*q.shape[:2], k.shape[2], q.shape[3])
        or 0 in q.shape
        or 0 in k.shape
    ):
        raise ValueError(
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; wanted k like v, "
            "with q's batch, heads and width, and at least one token in each"
        )


def check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k and v have one dtype."""
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"got q in {q.dtype}, k in {k.dtype}, v in {v.dtype}; wanted one dtype")


def widen(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def kept_blocks(ratio: float, blocks: int) -> int:
    """How many of the key blocks a block of queries attends to: rounded down, at least one."""
    return max(1, min(blocks, int(ratio * blocks)))


def block_map(q: Tensor, k: Tensor, *, block_q: int, block_k: int, ratio: float) -> Tensor:
    """For each block of queries, the key blocks whose mean key has the largest product with its mean query.

    q (B, N, L, D), k (B, N, S, D) -> indices (B, N, query blocks, kept_blocks), int32, ascending.  Scores are
    fp32, or fp64 for fp64 inputs; of equal ones the lower index is kept.  Nothing is differentiated
    (arXiv:2509.24006; keys less their mean, as published models were trained).
    """
    q, k = widen(q.detach()), widen(k.detach())
    # the mean key adds the same to all scores of a row: that much smaller they round, and tie, less
    mean_k = _block_means(k, block_k) - k.mean(-2, keepdim=True)
    scores = _block_means(q, block_q) @ mean_k.mT
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., : kept_blocks(ratio, scores.shape[-1])]
    return best.sort(-1).values.to(torch.int32)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, *, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v over the keys of the listed blocks alone, and its row-wise log-sum-exp.

    q (B, N, L, D), k and v (B, N, S, D), block_index as from block_map -> o (B, N, L, D), lse (B, N, L), both
    in fp32, or fp64 for fp64 inputs.  Differentiable both ways, with the list held fixed.
    """
    return _sparse_attention(q, k, v, block_index, block_q, block_k, partial(torch.softmax, dim=-1))


def sparse_attention_int8(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, *, block_q: int, block_k: int, fp8: bool
) -> Tensor:
    """The o of sparse_attention by coarser numbers, in fp32, or fp64 for fp64 inputs.

    int8, one scale a block: queries, and keys less their mean over the sequence, which moves all scores of a
    row alike.  fp8: in e4m3, values, one scale a channel, and weights up to 448, of which nothing is lost but
    the rounding (arXiv:2411.10958).
    """
    q, k, v = widen(q), widen(k), widen(v)
    q, k = _round_to_int8(q, block_q), _round_to_int8(k - k.mean(-2, keepdim=True), block_k)
    if not fp8:
        return sparse_attention(q, k, v, block_index, block_q=block_q, block_k=block_k)[0]
    scale = v.abs().amax(-2, keepdim=True).clamp(min=TINY) / E4M3_MAX
    v = scale * (v / scale).to(torch.float8_e4m3fn).to(v.dtype)

    def rounded_softmax(scores: Tensor) -> Tensor:
        weights = E4M3_MAX * (scores - scores.amax(-1, keepdim=True)).exp()
        return weights.to(torch.float8_e4m3fn).to(weights.dtype) / weights.sum(-1, keepdim=True)

    return _sparse_attention(q, k, v, block_index, block_q, block_k, rounded_softmax)[0]


def _sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_q: int,
    block_k: int,
    softmax: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    length, keys = q.shape[-2], k.shape[-2]
    duals = any(unpack_dual(x).tangent is not None for x in (q, k, v))
    q, k, v = (_into_blocks(widen(x), size) for x, size in ((q, block_q), (k, block_k), (v, block_k)))
    selected = math.prod(block_index.shape[:2]) * block_index.shape[-1] * block_k
    count = max(1, WORKSPACE // (selected * 2 * (block_q + q.shape[-1])))
    chunks = list(zip(q.split(count, dim=2), block_index.split(count, dim=2), strict=True))
    attend = partial(_attend_to_listed, k, v, keys, softmax)
    if len(chunks) > 1 and torch.is_grad_enabled() and not duals:
        # backward computes a chunk again instead of keeping all of them
        attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
    outputs = zip(*(attend(*chunk) for chunk in chunks), strict=True)
    o, lse = (torch.cat(parts, dim=2).flatten(2, 3)[:, :, :length] for parts in outputs)
    return o, lse


def linear_attention(q: Tensor, k: Tensor, v: Tensor, feature_map: str) -> Tensor:
    """f(q) (f(k)^T v) / (1e-5 + f(q) sum f(k)) over every key: attention whose cost is linear in the length.

    q (B, N, L, D), k and v (B, N, S, D); feature_map is a name in FEATURE_MAPS -> (B, N, L, D), in fp32, or
    fp64 for fp64 inputs (arXiv:2006.16236, eq. 5).
    """
    features = FEATURE_MAPS[feature_map]
    q, k, v = features(widen(q)), features(widen(k)), widen(v)
    return q @ (k.mT @ v) / (LINEAR_EPS + q @ k.sum(-2).unsqueeze(-1))


def _attend_to_listed(
    k: Tensor,
    v: Tensor,
    keys: int,
    softmax: Callable[[Tensor], Tensor],
    q: Tensor,
    block_index: Tensor,
) -> tuple[Tensor, Tensor]:
    """All in blocks: k, v (B, N, K, block_k, D), q (B, N, Q, block_q, D), index (B, N, Q, kept) -> o, lse."""
    heads, blocks, size = math.prod(k.shape[:2]), *k.shape[2:4]
    first = blocks * torch.arange(heads, device=k.device).view(*k.shape[:2], 1, 1)
    rows = (first + block_index).flatten()
    k, v = (
        x.flatten(0, 2).index_select(0, rows).view(*block_index.shape, *x.shape[3:]).flatten(3, 4)
        for x in (k, v)
    )
    scores = q / math.sqrt(q.shape[-1]) @ k.mT
    if keys % size:
        padding = block_index.unsqueeze(-1) * size + torch.arange(size, device=k.device) >= keys
        scores = scores.masked_fill(padding.flatten(3).unsqueeze(3), -torch.inf)
    return softmax(scores) @ v, scores.logsumexp(-1)


def _into_blocks(x: Tensor, size: int) -> Tensor:
    """(B, N, L, D) -> (B, N, blocks, size, D), the last block filled up with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))


def _round_to_int8(x: Tensor, size: int) -> Tensor:
    """(B, N, L, D) in steps of the 127th of each block's largest number."""
    blocks = _into_blocks(x, size)
    step = blocks.abs().amax((-2, -1), keepdim=True).clamp(min=TINY) / 127
    return (step * (blocks / step).round()).flatten(2, 3)[:, :, : x.shape[2]]


def _block_means(x: Tensor, size: int) -> Tensor:
    """(B, N, L, D) -> (B, N, blocks, D); a shorter last block by its own length."""
    starts = torch.arange(0, x.shape[-2], size, device=x.device)
    lengths = (x.shape[-2] - starts).clamp(max=size)
    return _into_blocks(x, size).sum(-2) / lengths.unsqueeze(-1)
