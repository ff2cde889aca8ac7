"""Triton kernels of kernels/block_map.py: means of blocks, their scores, the best of each row.

The means read every token once, and that is most of the time.  Everything is fp32; queries and keys lie in
memory tokens first, (B, L, N, D), as the model's projections leave them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import kept_blocks
from kernels.tiles import head_start, load_rows, tokens_first

HEAD_WIDTHS = (16, 32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# one compilation for every length, 1 included
LENGTHS = ("L", "S", "N", "Q", "K", "kept")
# tokens that a program of mean_kernel adds at once, and its warps: few, each with much on its way
TOKENS, WARPS = 16, 2
# blocks of a tile of scores, and channels of its steps
TILE, CHANNELS = 64, 32
# scores that a warp of select_kernel holds: 64 registers a thread
SCORES_OF_A_WARP = 2048


@triton.jit
def _store_mean(
    x_ptr, mean_ptr, block, blocks, length, N,
    SIZE: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Mean of one block of one head of x (B, L, N, D), less the head's first token if SHIFT."""
    head = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, D)
    x_ptr += head_start(head, length, N, D)
    first = block * SIZE
    end = tl.minimum(first + SIZE, length)
    total = tl.zeros([TOKENS, D], tl.float32)
    # unrolled: the loads of all parts are on their way at once
    for part in tl.static_range(0, SIZE, TOKENS):
        x = load_rows(x_ptr, first + part, end, N * D, D, TOKENS).to(tl.float32)
        if SHIFT:
            shift = tl.load(x_ptr + channel).to(tl.float32)
            x = tl.where((first + part + tl.arange(0, TOKENS) < end)[:, None], x - shift[None, :], 0.0)
        total += x
    mean = tl.sum(total, 0) * tl.math.div_rn(1.0, (end - first).to(tl.float32))
    tl.store(mean_ptr + (head * blocks + block) * D + channel, mean)


@triton.jit(do_not_specialize=LENGTHS)
def mean_kernel(
    q_ptr, k_ptr, mean_q_ptr, mean_k_ptr, L, S, N, Q, K,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Means of the Q blocks of queries and then the K blocks of keys: (B, N, Q, D) and (B, N, K, D)."""
    block = tl.program_id(1)
    if block < Q:
        _store_mean(q_ptr, mean_q_ptr, block, Q, L, N, BLOCK_Q, D, TOKENS, False)
    else:
        # any one vector taken from all keys adds the same to all scores of a row.  Their first has most of
        # what they share, which would cost bits, and needs no pass of its own as their mean does
        _store_mean(k_ptr, mean_k_ptr, block - Q, K, S, N, BLOCK_K, D, TOKENS, True)


@triton.jit(do_not_specialize=LENGTHS)
def score_kernel(
    mean_q_ptr, mean_k_ptr, score_ptr, Q, K, D: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr
):
    """Products of the means (B, N, Q, K), a tile of one head a program, to the precision of fp32.

    Rows are filled up to whole tiles.
    """
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    key = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
    head = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, CHANNELS)[None, :]
    mean_q_ptr += head * Q * D
    mean_k_ptr += head * K * D
    score = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, D, CHANNELS):
        q = tl.load(mean_q_ptr + row * D + start + channel, mask=row < Q, other=0.0)
        k = tl.load(mean_k_ptr + key * D + start + channel, mask=key < K, other=0.0)
        # three products of tensor cores, without which fp32 is slow
        score = tl.dot(q, k.T, score, input_precision="tf32x3")
    key = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    tl.store(score_ptr + (head * Q + row) * (tl.cdiv(K, TILE) * TILE) + key, score, mask=row < Q)


@triton.jit
def _as_rank(score):
    """Integers in the order of the numbers."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _as_score(rank):
    """The opposite of _as_rank."""
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=LENGTHS)
def select_kernel(score_ptr, index_ptr, K, kept, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """The `kept` best of one row of K <= WIDTH scores, ascending; of equal ones the lower index.

    Rows are filled up to whole tiles.
    """
    row = tl.program_id(0).to(tl.int64)
    key = tl.arange(0, WIDTH)
    pitch = tl.cdiv(K, TILE) * TILE
    score = tl.load(score_ptr + row * pitch + key, mask=key < pitch, other=0.0)
    # with 0 added -0 is 0; NaN comes first, and what is absent comes last
    rank = tl.minimum(_as_rank(score + 0.0), 0x7FFFFFFE)
    low = tl.min(tl.where(key < K, rank, 0x7FFFFFFE), 0)
    rank = tl.where(key < K, rank, -0x80000000)
    high = tl.max(rank, 0) + 1
    # at least `kept` ranks reach low, and fewer reach high
    count = K
    while (count != kept) & (low + 1 < high):
        # halfway between the numbers, which takes fewer steps than between their ranks; but there, without
        # overflow, where a number is infinite or none
        ends = 0.5 * _as_score(low) + 0.5 * _as_score(high)
        between = (low & high) + ((low ^ high) >> 1)
        middle = tl.where(tl.abs(ends) < float("inf"), _as_rank(ends), between)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        reach = tl.sum((rank >= middle).to(tl.int32), 0)
        if reach >= kept:
            low, count = middle, reach
        else:
            high = middle
    if count != kept:
        # too many: of those at low the first are taken
        level = rank == low
        missing = kept - tl.sum((rank > low).to(tl.int32), 0)
        rank = tl.where(level & (tl.cumsum(level.to(tl.int32), 0) > missing), -0x80000000, rank)
    chosen = rank >= low
    # no cast: the compiler would sum in the layout of the store, which takes twice as many steps
    place = tl.cumsum(tl.where(chosen, 1, 0), 0) - 1
    tl.store(index_ptr + row * kept + place, key, mask=chosen)


def is_supported(q: Tensor, k: Tensor) -> bool:
    """Whether the kernels here take q and k; the twin takes anything."""
    return q.dtype == k.dtype and q.dtype in DTYPES and q.shape[-1] in HEAD_WIDTHS


def block_map(q: Tensor, k: Tensor, *, block_q: int, block_k: int, ratio: float) -> Tensor:
    """The twin of kernels.reference.block_map."""
    q, k = tokens_first(q), tokens_first(k)
    (B, L, N, D), S = q.shape, k.shape[1]
    Q, K = triton.cdiv(L, block_q), triton.cdiv(S, block_k)
    kept = kept_blocks(ratio, K)
    mean_q, mean_k, scores = (
        torch.empty(B, N, *size, dtype=torch.float32, device=q.device)
        for size in ((Q, D), (K, D), (Q, triton.cdiv(K, TILE) * TILE))
    )
    index = torch.empty(B, N, Q, kept, dtype=torch.int32, device=q.device)
    width = triton.next_power_of_2(K)
    with torch.cuda.device_of(q):
        sizes = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "D": D, "TOKENS": TOKENS}
        mean_kernel[B * N, Q + K](q, k, mean_q, mean_k, L, S, N, Q, K, **sizes, num_warps=WARPS)
        grid = (triton.cdiv(Q, TILE), triton.cdiv(K, TILE), B * N)
        score_kernel[grid](mean_q, mean_k, scores, Q, K, D=D, TILE=TILE, CHANNELS=min(D, CHANNELS))
        warps = max(1, width // SCORES_OF_A_WARP)
        select_kernel[(B * N * Q,)](scores, index, K, kept, WIDTH=width, TILE=TILE, num_warps=warps)
    return index
