"""Triton kernels of kernels/block_sparse_int8.py: queries and keys to int8, values to e4m3, and attention.

Layouts and lists as in kernels/block_sparse_triton.py, but for e4m3 values, which lie in tiles and there
channels first, (B, N, tiles, D, keys): Hopper multiplies 8-bit numbers only along what is contiguous.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.block_sparse_triton import Blocks, Form, first_key, options
from kernels.linear_attention_triton import Branch
from kernels.reference import E4M3_MAX, TINY
from kernels.tiles import (
    HAS_GLUON,
    LOG2E,
    allow_descriptors,
    head_start,
    load_rows,
    load_tile,
    matrix,
    store_rows,
    tokens_first,
)

LOG2_E4M3_MAX = tl.constexpr(math.log2(E4M3_MAX))
# an integer below 2^22 added to these bits gives the bits of a float: 1.5 * 2^23 and that integer
MAGIC_BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(12582912.0)
# of a tile of attention, or fewer where a block has fewer
KEYS = 64
# tokens of a program of statistics_kernel, and how many keys of each it takes where there are many
CHUNK, SAMPLE = 512, 64


class Eight(NamedTuple):
    """How attention is laid out, and whether its values are e4m3, or else as they come."""

    form: NamedTuple
    fp8: bool


HOPPER = Form(64, KEYS, 4, 1, tma=True, registers=128)
PORTABLE = Form(128, KEYS, 8, 2)


def forms_for(capability: int, block_q: int, block_k: int) -> list[Eight]:
    """What runs on a GPU of that capability, 90 for 9.0; best first.

    Those whose form is no Form are of the kernel in kernels/block_sparse_int8_hopper.py.
    """
    own = []
    if capability == 90 and HAS_GLUON:
        from kernels.block_sparse_int8_hopper import FORMS

        own = [Eight(form, True) for blocks, form in FORMS.items() if blocks == (block_q, block_k)]
    # the portable form would be slower on Hopper than attention in bf16
    form = HOPPER if capability == 90 else PORTABLE
    eights = [Eight(form, fp8) for fp8 in (True, False) if capability >= 89 or not fp8]
    return own + eights


# In what follows the heads of a token are neighbours in the grid as they are in memory: together, programs
# that run at a time read long runs of it.


@triton.jit(do_not_specialize=("S", "N", "taken"))
def statistics_kernel(
    k_ptr, v_ptr, sum_ptr, max_ptr, S, N, taken, D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr
):
    """Of a chunk: the sum of its first `taken` keys and, where values are given, each channel's largest.

    Both (chunks, B N, D).
    """
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * CHUNK
    off = head_start(head, S, N, D)
    place = (tl.program_id(1) * tl.num_programs(0) + head) * D + tl.arange(0, D)
    total = tl.zeros([ROWS, D], tl.float32)
    # stages are said, as loads that no product takes would else not be started ahead of their turn
    for start in tl.range(first, first + taken, ROWS, num_stages=4):
        total += load_rows(k_ptr + off, start, S, N * D, D, ROWS).to(tl.float32)
    tl.store(sum_ptr + place, tl.sum(total, 0))
    if v_ptr is not None:
        largest = tl.zeros([ROWS, D], tl.float32)
        for start in tl.range(first, first + CHUNK, ROWS, num_stages=4):
            v = load_rows(v_ptr + off, start, S, N * D, D, ROWS)
            largest = tl.maximum(largest, tl.abs(v.to(tl.float32)))
        tl.store(max_ptr + place, tl.max(largest, 0))


@triton.jit(do_not_specialize=("chunks", "keys"))
def fold_kernel(
    sum_ptr, max_ptr, mean_ptr, step_ptr, chunks, keys, tiny,
    D: tl.constexpr, ROWS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Of what statistics_kernel found in a head's chunks: the mean of its `keys` keys, steps of channels."""
    head = tl.program_id(0)
    stride = tl.num_programs(0) * D
    total = tl.zeros([ROWS, D], tl.float32)
    largest = tl.full([ROWS, D], tiny, tl.float32)
    for start in range(0, chunks, ROWS):
        total += load_rows(sum_ptr + head * D, start, chunks, stride, D, ROWS)
        if max_ptr is not None:
            largest = tl.maximum(largest, load_rows(max_ptr + head * D, start, chunks, stride, D, ROWS))
    place = head * D + tl.arange(0, D)
    tl.store(mean_ptr + place, tl.sum(total, 0) / keys)
    if max_ptr is not None:
        tl.store(step_ptr + place, tl.max(largest, 0) / LARGEST)


@triton.jit(do_not_specialize=("L", "N"))
def quantise_kernel(x_ptr, mean_ptr, y_ptr, step_ptr, L, N, tiny, D: tl.constexpr, ROWS: tl.constexpr):
    """A block of rows, less the mean where one is given, in steps of the 127th of its largest number."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * ROWS
    off = head_start(head, L, N, D)
    x = load_rows(x_ptr + off, first, L, N * D, D, ROWS).to(tl.float32)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + head * D + tl.arange(0, D))
        x = tl.where((first + tl.arange(0, ROWS) < L)[:, None], x - mean[None, :], 0.0)
    step = tl.maximum(tl.max(tl.abs(x)), tiny) / 127
    # the lowest byte of the sum's bits is the integer nearest to x / step; conversions are slow
    y = (x * (1 / step) + MAGIC).to(tl.int32, bitcast=True)
    store_rows(y_ptr + off, y, first, L, N * D, D, ROWS)
    tl.store(step_ptr + head * tl.num_programs(1) + tl.program_id(1), step)


@triton.jit(do_not_specialize=("S", "N"))
def quantise_values_kernel(
    v_ptr, step_ptr, y_ptr, S, N, D: tl.constexpr, KEYS: tl.constexpr, PAIRED: tl.constexpr
):
    """A tile of values in e4m3 and steps of their channels', channels first; zeros past S.

    Four keys are an integer of y.  PAIRED: of 16 keys the pairs (0, 1), (2, 3), ... lie in the order 0, 4, 1,
    5, 2, 6, 3, 7.
    """
    head = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    v_ptr += head_start(head, S, N, D) + tile.to(tl.int64) * KEYS * (N * D)
    channel = tl.arange(0, D)
    scale = 1 / tl.load(step_ptr + head * D + channel)
    place = tl.arange(0, KEYS // 4)
    four = tl.zeros([KEYS // 4, D], tl.int32)
    for byte in tl.static_range(4):
        key = place // 4 * 16 + byte // 2 * 8 + place % 4 * 2 + byte % 2 if PAIRED else place * 4 + byte
        present = (tile * KEYS + key < S)[:, None]
        v = tl.load(v_ptr + key[:, None] * (N * D) + channel[None, :], mask=present, other=0.0)
        v = (v.to(tl.float32) * scale[None, :]).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        four |= v.to(tl.int32) << (8 * byte)
    y_ptr += (head * tl.num_programs(1) + tile) * (D * KEYS // 4)
    tl.store(y_ptr + channel[:, None] * (KEYS // 4) + place[None, :], four.T)


@triton.jit(do_not_specialize=("L", "S", "N", "kept"))
def attention_kernel(
    q_ptr, k_ptr, v_ptr, q_step_ptr, k_step_ptr, v_step_ptr, o_ptr, list_ptr, kept, scale, L, S, N,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """o of a tile of rows; v_step_ptr is given with e4m3 values."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    stride = N * D
    q_off = head_start(head, L, N, D)
    k_off = head_start(head, S, N, D)
    q_rows = matrix(q_ptr + q_off, L, stride, D, ROWS, TMA)
    k_rows = matrix(k_ptr + k_off, S, stride, D, KEYS, TMA)
    if v_step_ptr is None:
        v_rows = matrix(v_ptr + k_off, S, stride, D, KEYS, TMA)
    else:
        # the tiles of a head, one below the other; load_rows takes no stride that is a constant
        height, width = tl.cdiv(S, KEYS) * D, tl.full([], KEYS, tl.int32)
        v_rows = matrix(v_ptr + head * height * KEYS, height, width, KEYS, D, TMA)
    query_block = head * tl.cdiv(L, BLOCK_Q) + first // BLOCK_Q
    list_ptr += query_block * kept
    k_step_ptr += head * tl.cdiv(S, BLOCK_K)
    q_step = tl.load(q_step_ptr + query_block) * (scale * LOG2E)
    q = load_tile(q_rows, first, L, stride, D, ROWS, TMA)
    m = tl.full([ROWS], -float("inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, D], tl.float32)
    for tile in range(0, kept * (BLOCK_K // KEYS)):
        key = first_key(list_ptr, tile, BLOCK_K, KEYS)
        k = load_tile(k_rows, key, S, stride, D, KEYS, TMA)
        # 127 * 127 * D is below 2^22; converting integers is as slow as exponentials
        s = tl.dot(q, k.T, tl.full([ROWS, KEYS], MAGIC_BITS, tl.int32), out_dtype=tl.int32)
        s = s.to(tl.float32, bitcast=True) - MAGIC  # [ROWS, KEYS]
        s = tl.where((key + tl.arange(0, KEYS) < S)[None, :], s, -float("inf"))
        step = q_step * tl.load(k_step_ptr + key // BLOCK_K)
        m_new = tl.maximum(m, tl.max(s, 1) * step)
        shrink = tl.exp2(m - m_new)
        m = m_new
        if v_step_ptr is None:
            p = tl.exp2(s * step - m_new[:, None])
            v = load_tile(v_rows, key, S, stride, D, KEYS, TMA)
        else:
            # the largest weight of a row is the largest e4m3
            p = tl.exp2(s * step - (m_new - LOG2_E4M3_MAX)[:, None])
            v = load_tile(v_rows, key // KEYS * D, height, width, KEYS, D, TMA).T
        l = l * shrink + tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None])
    o = o / l[:, None]
    if v_step_ptr is not None:
        o *= tl.load(v_step_ptr + head * D + tl.arange(0, D))[None, :]
    store_rows(o_ptr + q_off, o, first, L, stride, D, ROWS)


class Quantised(NamedTuple):
    """q and k int8, v e4m3 or as it came, in the layouts above, and the steps they count in, fp32."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_step: Tensor
    k_step: Tensor
    v_step: Tensor | None


def quantise(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, fp8: bool, paired: bool = False) -> Quantised:
    """q and k (B, N, L or S, D) by blocks, k less a mean; where fp8, v by channels over the sequence.

    The mean of a long sequence is that of every eighth key or so: any vector taken from all keys moves the
    scores of a row alike, and the nearer it is to the mean the smaller are the steps.
    paired: the keys of e4m3 values are in the order of quantise_values_kernel.
    """
    q, k, v = (tokens_first(x) for x in (q, k, v))
    with torch.cuda.device_of(q):
        k_mean, v_step = _statistics(k, v if fp8 else None)
        q_int8, q_step = _to_int8(q, None, blocks.q)
        k_int8, k_step = _to_int8(k, k_mean, blocks.k)
        if fp8:
            v = _to_e4m3(v, v_step, min(KEYS, blocks.k), paired)
    return Quantised(q_int8, k_int8, v, q_step, k_step, v_step)


def attend(
    x: Quantised, blocks: Blocks, form: NamedTuple, dtype: torch.dtype, branch: Branch | None = None
) -> Tensor:
    """o (B, N, L, D) in that dtype, tokens first in memory; branch: as of block_sparse_triton.attention."""
    (B, L, N, D), S = x.q.shape, x.k.shape[1]
    o = torch.empty(B, L, N, D, dtype=dtype, device=x.q.device)
    if not isinstance(form, Form):
        from kernels import block_sparse_int8_hopper

        with torch.cuda.device_of(o):
            block_sparse_int8_hopper.launch(x, o, branch, blocks.index.contiguous(), blocks.k, form)
        return o.transpose(1, 2)
    launch = options(form, D, dtype, blocks.q, blocks.k)
    del launch["DOT"]
    lists = (blocks.index.contiguous(), blocks.index.shape[-1])
    with torch.cuda.device_of(o):
        if form.tma:
            allow_descriptors(o.device)
        attention_kernel[triton.cdiv(L, launch["ROWS"]), B * N](
            *x[:6], o, *lists, 1 / math.sqrt(D), L, S, N, **launch
        )
    return o.transpose(1, 2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, eight: Eight, branch: Branch | None = None
) -> Tensor:
    """o (B, N, L, D) in q's dtype, tokens first in memory."""
    quantised = quantise(q, k, v, blocks, eight.fp8, paired=not isinstance(eight.form, Form))
    return attend(quantised, blocks, eight.form, q.dtype, branch)


def _statistics(k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A mean of keys (B, S, N, D), and the steps of e4m3 values, both (B, N, D)."""
    B, S, N, D = k.shape
    chunks = triton.cdiv(S, CHUNK)
    taken = CHUNK if chunks <= CHUNK // SAMPLE else SAMPLE
    keys = (chunks - 1) * taken + min(taken, S - (chunks - 1) * CHUNK)
    sums, mean = (torch.empty(n, B, N, D, dtype=torch.float32, device=k.device) for n in (chunks, 1))
    largest, step = (None, None) if v is None else (torch.empty_like(sums), torch.empty_like(mean[0]))
    statistics_kernel[B * N, chunks](k, v, sums, largest, S, N, taken, D=D, CHUNK=CHUNK, ROWS=32, num_warps=4)
    tensors = (sums, largest, mean, step)
    fold_kernel[(B * N,)](*tensors, chunks, keys, TINY, D=D, ROWS=64, LARGEST=E4M3_MAX, num_warps=8)
    return mean[0], step


def _to_int8(x: Tensor, mean: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """(B, L, N, D) -> int8 of that shape, and steps (B, N, blocks)."""
    B, L, N, D = x.shape
    steps = torch.empty(B, N, triton.cdiv(L, block), dtype=torch.float32, device=x.device)
    y = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    grid = (B * N, steps.shape[2])
    quantise_kernel[grid](x, mean, y, steps, L, N, TINY, D, block, num_warps=_warps(block, D))
    return y, steps


def _to_e4m3(v: Tensor, step: Tensor, keys: int, paired: bool) -> Tensor:
    """(B, S, N, D) in these steps -> (B, N, tiles, D, keys)."""
    B, S, N, D = v.shape
    tiles = triton.cdiv(S, keys)
    y = torch.empty(B, N, tiles, D, keys // 4, dtype=torch.int32, device=v.device)
    warps = _warps(keys, D)
    quantise_values_kernel[B * N, tiles](v, step, y, S, N, D, keys, paired, num_warps=warps)
    return y.view(torch.float8_e4m3fn)


def _warps(rows: int, head_dim: int) -> int:
    """For a block: those of whose threads each has 64 numbers, so 128 bytes on their way at once."""
    return max(1, rows * head_dim // 2048)
