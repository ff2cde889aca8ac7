"""Attention with its tangent for Hopper GPUs, in Gluon: the portable kernel with its overlap spelt out.

A program owns one head and two tiles of query rows.  One warp loads tiles by TMA; two warp groups, a tile of
rows each, multiply.  Of a block's six products, two at a time run under arithmetic that does not need them:

    dS = dQ K' + Q dK'         under   P = exp(S), its row sums and the shrinking of both sums
    O += P V, dO += P dV       under   H = P * dS and its row sums
    dO += H V, next S = Q K'   under   the other warp group's arithmetic

ptxas keeps products in flight only if none is left pending from one turn of the loop to the next; that is why
S is multiplied one block ahead, at the end of a turn.
"""

import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.tiles_hopper import new_barriers, new_tiles, tma_load

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
# rows of every tile: what one warp group multiplies at once, and what its registers hold at D = 128
TILE = 64
# buffers of every loaded tile; at D = 128 there is shared memory for two
STAGES = 2
# 12 warps (two groups of four, and four for the loader) have 168 registers each, before they trade them
LAUNCH = {"num_warps": 4, "maxnreg": 168}
TRADED_REGISTERS = gl.constexpr((240, 24))


@gluon.jit
def _load(descs, tiles, barriers, batch, column, first, S):
    """The loading warp: queries once, then keys and values as their buffers fall free."""
    q_desc, k_desc, v_desc, dq_desc, dk_desc, dv_desc = descs
    q_tiles, dq_tiles, k_tiles, dk_tiles, v_tiles, dv_tiles = tiles
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    TILE: gl.constexpr = k_tiles.shape[2]
    STAGES: gl.constexpr = k_tiles.shape[0]
    BYTES: gl.constexpr = q_desc.block_type.nbytes
    mbarrier.expect(q_ready, 4 * BYTES)
    for group in gl.static_range(2):
        at = [batch, first + group * TILE, column]
        tma_load(q_desc, at, q_ready, q_tiles.index(group))
        tma_load(dq_desc, at, q_ready, dq_tiles.index(group))
    for block in range(gl.cdiv(S, TILE)):
        stage = block % STAGES
        phase = (block // STAGES & 1) ^ 1
        at = [batch, block * TILE, column]
        mbarrier.wait(k_free.index(stage), phase)
        mbarrier.expect(k_ready.index(stage), 2 * BYTES)
        tma_load(k_desc, at, k_ready.index(stage), k_tiles.index(stage))
        tma_load(dk_desc, at, k_ready.index(stage), dk_tiles.index(stage))
        mbarrier.wait(v_free.index(stage), phase)
        mbarrier.expect(v_ready.index(stage), 2 * BYTES)
        tma_load(v_desc, at, v_ready.index(stage), v_tiles.index(stage))
        tma_load(dv_desc, at, v_ready.index(stage), dv_tiles.index(stage))


@gluon.jit
def _matrix(tiles, index):
    """Tile `index` of a stack of them, (1, rows, D) each, as a matrix."""
    return tiles.index(index).reshape([tiles.shape[2], tiles.shape[3]])


@gluon.jit
def _attend(group, outputs, tiles, barriers, batch, head, first, scale, L, S, N):
    """A warp group: its tile of query rows against every key."""
    o_ptr, do_ptr, lse_ptr = outputs
    q_tiles, dq_tiles, k_tiles, dk_tiles, v_tiles, dv_tiles = tiles
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    STAGES: gl.constexpr = k_tiles.shape[0]
    TILE: gl.constexpr = k_tiles.shape[2]
    D: gl.constexpr = k_tiles.shape[3]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)

    q = _matrix(q_tiles, group)
    dq = _matrix(dq_tiles, group)
    zero = gl.zeros([TILE, TILE], gl.float32, SCORES)
    m = gl.full([TILE], -float("inf"), gl.float32, ROW)
    l = gl.zeros([TILE], gl.float32, ROW)
    r = gl.zeros([TILE], gl.float32, ROW)
    o = gl.zeros([TILE, D], gl.float32, OUT)
    do = gl.zeros([TILE, D], gl.float32, OUT)
    mbarrier.wait(q_ready, 0)
    mbarrier.wait(k_ready.index(0), 0)
    s = warpgroup_mma(q, _matrix(k_tiles, 0).permute([1, 0]), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    blocks = gl.cdiv(S, TILE)
    for block in range(blocks):
        stage = block % STAGES
        v = _matrix(v_tiles, stage)
        ds = warpgroup_mma(dq, _matrix(k_tiles, stage).permute([1, 0]), zero, use_acc=False, is_async=True)
        ds = warpgroup_mma(q, _matrix(dk_tiles, stage).permute([1, 0]), ds, is_async=True)
        key = block * TILE + gl.arange(0, TILE, gl.SliceLayout(0, SCORES))
        s = gl.where((key < S)[None, :], s, -float("inf"))
        m_new = gl.maximum(m, gl.max(s, 1) * (scale * LOG2E))
        p = gl.exp2(s * (scale * LOG2E) - m_new[:, None])
        shrink = gl.exp2(m - m_new)
        m = m_new
        l = l * shrink + gl.sum(p, 1)
        o = o * gl.convert_layout(shrink, OUT_ROW)[:, None]
        do = do * gl.convert_layout(shrink, OUT_ROW)[:, None]
        left = gl.convert_layout(p.to(k_tiles.dtype), LEFT)
        mbarrier.wait(v_ready.index(stage), block // STAGES & 1)
        o = warpgroup_mma(left, v, o, is_async=True)
        do = warpgroup_mma(left, _matrix(dv_tiles, stage), do, is_async=True)
        ds = warpgroup_mma_wait(2, [ds])
        mbarrier.arrive(k_free.index(stage))
        # absent keys were loaded as zeros: ds is 0 where p is, never infinite
        h = p * (ds * scale)
        r = r * shrink + gl.sum(h, 1)
        do = warpgroup_mma(gl.convert_layout(h.to(k_tiles.dtype), LEFT), v, do, is_async=True)
        # after the last block a product of stale keys, which nobody reads
        ahead = (block + 1) % STAGES
        mbarrier.wait(k_ready.index(ahead), (block + 1) // STAGES & 1, pred=block + 1 < blocks)
        s = warpgroup_mma(q, _matrix(k_tiles, ahead).permute([1, 0]), zero, use_acc=False, is_async=True)
        s, o, do = warpgroup_mma_wait(0, [s, o, do])
        mbarrier.arrive(v_free.index(stage))

    row = first + group * TILE + gl.arange(0, TILE, ROW)
    gl.store(lse_ptr + (batch * N + head) * L + row, (m + gl.log2(l)) * LN2, row < L)
    o = o / gl.convert_layout(l, OUT_ROW)[:, None]
    do = do / gl.convert_layout(l, OUT_ROW)[:, None] - gl.convert_layout(r / l, OUT_ROW)[:, None] * o
    row = first + group * TILE + gl.arange(0, TILE, OUT_ROW)
    at = row[:, None] * (N * D) + gl.arange(0, D, gl.SliceLayout(0, OUT))[None, :]
    start = (batch.to(gl.int64) * L * N + head) * D
    gl.store(o_ptr + start + at, o.to(k_tiles.dtype), (row < L)[:, None])
    gl.store(do_ptr + start + at, do.to(k_tiles.dtype), (row < L)[:, None])


@gluon.jit(do_not_specialize=("L", "S", "N"))
def tangent_kernel(
    q_desc, k_desc, v_desc, dq_desc, dk_desc, dv_desc, o_ptr, do_ptr, lse_ptr, scale, L, S, N,
    STAGES: gl.constexpr,
):  # fmt: skip
    """o, do and the log-sum-exp of two tiles of rows; descriptors of (B, L or S, N D), tiles (1, TILE, D)."""
    TILE: gl.constexpr = q_desc.block_type.shape[1]
    D: gl.constexpr = q_desc.block_type.shape[2]
    queries = (new_tiles(q_desc, 2), new_tiles(dq_desc, 2))
    keys = (new_tiles(k_desc, STAGES), new_tiles(dk_desc, STAGES))
    values = (new_tiles(v_desc, STAGES), new_tiles(dv_desc, STAGES))
    # both warp groups must have read a tile before it is overwritten
    k_ready, k_free = new_barriers(STAGES, 1), new_barriers(STAGES, 2)
    v_ready, v_free = new_barriers(STAGES, 1), new_barriers(STAGES, 2)
    q_ready = new_barriers(1, 1).index(0)
    first = gl.program_id(0) * (2 * TILE)
    batch = gl.program_id(1) // N
    head = gl.program_id(1) % N
    descs = (q_desc, k_desc, v_desc, dq_desc, dk_desc, dv_desc)
    tiles = queries + keys + values
    barriers = (q_ready, k_ready, k_free, v_ready, v_free)
    outputs = (o_ptr, do_ptr, lse_ptr)
    gl.warp_specialize(
        [
            (_attend, (0, outputs, tiles, barriers, batch, head, first, scale, L, S, N)),
            (_attend, (1, outputs, tiles, barriers, batch, head, first, scale, L, S, N)),
            (_load, (descs, tiles, barriers, batch, head * D, first, S)),
        ],
        [4, 1],
        TRADED_REGISTERS,
    )


def tile_layout(head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile (1, TILE, D) lies in shared memory."""
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([1, TILE, head_dim], element)


def launch(tensors: list[Tensor], o: Tensor, do: Tensor, lse: Tensor) -> None:
    """Fill o, do (B, L, N, D) and lse (B, N, L), fp32, from packed q, k, v, dq, dk, dv (B, L or S, N, D)."""
    B, L, N, D = o.shape
    layout = tile_layout(D, o.dtype)
    # written out, as the stride of a dimension of one element may be anything
    descs = [
        TensorDescriptor(x, [B, x.shape[1], N * D], [x.shape[1] * N * D, N * D, 1], [1, TILE, D], layout)
        for x in tensors
    ]
    grid = (triton.cdiv(L, 2 * TILE), B * N)
    sizes = (1 / math.sqrt(D), L, tensors[1].shape[1], N)
    tangent_kernel[grid](*descs, o, do, lse, *sizes, STAGES, **LAUNCH)
