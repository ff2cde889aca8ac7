"""The 8-bit attention of kernels/block_sparse_int8.py for Hopper GPUs, in Gluon.

Programs, warps and barriers are those of kernels/block_sparse_hopper.py.  A step is two blocks of keys, each
with its own steps of quantisation, scores, weights and product; queries stay in registers.
"""

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.block_sparse_hopper import (
    GROUP_REGISTERS,
    LOADER_REGISTERS,
    LOG2E,
    ROWS,
    Form,
    _fill,
    branch_arguments,
    element,
    packed,
    placed,
    programs,
)
from kernels.block_sparse_int8_triton import LOG2_E4M3_MAX, MAGIC, MAGIC_BITS, Quantised
from kernels.linear_attention_hopper import add_branch, branch_numbers, branch_queries, new_branch
from kernels.linear_attention_triton import Branch
from kernels.tiles_hopper import new_barriers, new_tiles, tma_store

# by the sizes of blocks of queries and keys, made for D = 128
FORMS = {(128, 64): Form(128, 2, 1)}
# blocks of a step
BLOCKS = gl.constexpr(2)


@gluon.jit
def _multiply(q, k_tiles, stage, start):
    """Scores of the two blocks of a step, as floats' bits: MAGIC and the integer; not waited for."""
    SIZE: gl.constexpr = k_tiles.shape[2]
    D: gl.constexpr = k_tiles.shape[3]
    k0 = k_tiles.index(stage * BLOCKS).reshape([SIZE, D]).permute([1, 0])
    k1 = k_tiles.index(stage * BLOCKS + 1).reshape([SIZE, D]).permute([1, 0])
    return warpgroup_mma(q, k0, start, is_async=True), warpgroup_mma(q, k1, start, is_async=True)


@gluon.jit
def _accumulate(p0, p1, v_tiles, stage, o):
    """o and the products of two blocks' weights with their values; not waited for."""
    D: gl.constexpr = v_tiles.shape[2]
    SIZE: gl.constexpr = v_tiles.shape[3]
    v0 = v_tiles.index(stage * BLOCKS).reshape([D, SIZE]).permute([1, 0])
    v1 = v_tiles.index(stage * BLOCKS + 1).reshape([D, SIZE]).permute([1, 0])
    return warpgroup_mma(p1, v1, warpgroup_mma(p0, v0, o, is_async=True), is_async=True)


@gluon.jit
def _steps(list_ptr, k_step_ptr, first, kept, q_step):
    """What the integers of the two blocks from the first list entry on count in."""
    step0 = gl.load(k_step_ptr + gl.load(list_ptr + first))
    step1 = gl.load(k_step_ptr + gl.load(list_ptr + gl.minimum(first + 1, kept - 1)))
    return step0 * q_step, step1 * q_step


@gluon.jit
def _largest(s0, s1, step0, step1):
    return gl.maximum((gl.max(s0, 1) - MAGIC) * step0, (gl.max(s1, 1) - MAGIC) * step1)


@gluon.jit
def _weights(s, step, m):
    """exp2 of scores less m, of which the largest becomes the largest e4m3."""
    # MAGIC * step is rounded to half a step, which is what one of the D roundings of a score makes of it
    return gl.exp2(s * step - (MAGIC * step + (m - LOG2_E4M3_MAX))[:, None])


@gluon.jit
def _left(p, LEFT: gl.constexpr):
    """Weights [rows, keys] in e4m3 as a product takes them, keys in the order of `paired` values.

    Every thread then multiplies by the numbers it has, and four of them are made one register at once.
    """
    KEYS: gl.constexpr = p.shape[1]
    p = p.reshape([p.shape[0], KEYS // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([p.shape[0], KEYS])
    return gl.inline_asm_elementwise(
        "{ .reg .b16 low, high;"
        "cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;"
        "mov.b32 $0, {low, high}; }",
        "=r,f,f,f,f",
        [gl.convert_layout(p, LEFT)],
        dtype=gl.float8e4nv,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _attend(group, outputs, queries, keys, values, branch, steps_of, work, MAP: gl.constexpr):
    """A warp group: its rows of every tile against the keys listed for them."""
    o_desc, o_tiles = outputs
    q_tiles, q_ready, q_free = queries
    k_tiles, k_ready, k_free = keys
    v_tiles, v_ready, v_free = values
    q_step_ptr, k_step_ptr, v_step_ptr = steps_of
    list_ptr, start, end, stride, kept, scale, L, S, N = work
    GROUPS: gl.constexpr = q_tiles.shape[0]
    HEIGHT: gl.constexpr = q_tiles.shape[2]
    D: gl.constexpr = q_tiles.shape[3]
    SIZE: gl.constexpr = k_tiles.shape[2]
    STAGES: gl.constexpr = k_ready.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    # of products in 16 bits, of which a thread has the same numbers
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 4)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    COLUMN: gl.constexpr = gl.SliceLayout(0, OUT)

    steps = gl.cdiv(kept, BLOCKS)
    blocks = gl.cdiv(L, GROUPS * HEIGHT)
    key_blocks = gl.cdiv(S, SIZE)
    o_tile = o_tiles.index(group)
    magic = gl.full([HEIGHT, SIZE], MAGIC_BITS, gl.int32, SCORES)
    key = gl.arange(0, SIZE, gl.SliceLayout(0, SCORES))
    parity = 0
    count = 0
    for tile in range(start, end, stride):
        head = tile // blocks
        row_list = list_ptr + tile.to(gl.int64) * kept
        k_steps = k_step_ptr + head * key_blocks
        q_step = gl.load(q_step_ptr + tile) * (scale * LOG2E)
        entry = (steps - 1) * BLOCKS
        step0, step1 = _steps(row_list, k_steps, entry, kept, q_step)
        present = (kept - 1) % BLOCKS * SIZE + gl.minimum(S - gl.load(row_list + kept - 1) * SIZE, SIZE)
        mbarrier.wait(q_ready, parity)
        q = q_tiles.index(group).reshape([HEIGHT, D]).load(gl.DotOperandLayout(0, SCORES, 4))
        mbarrier.arrive(q_free)
        stage = count % STAGES
        mbarrier.wait(k_ready.index(stage), count // STAGES & 1)
        s0, s1 = _multiply(q, k_tiles, stage, magic)
        s0, s1 = warpgroup_mma_wait(0, [s0, s1])
        mbarrier.arrive(k_free.index(stage))
        s0 = gl.where((key < present)[None, :], s0.to(gl.float32, bitcast=True), -float("inf"))
        s1 = gl.where((key + SIZE < present)[None, :], s1.to(gl.float32, bitcast=True), -float("inf"))
        m = _largest(s0, s1, step0, step1)
        p0 = _weights(s0, step0, m)
        p1 = _weights(s1, step1, m)
        l = gl.sum(p0 + p1, 1)
        o = gl.zeros([HEIGHT, D], gl.float32, OUT)
        for _ in range(1, steps):
            before = count % STAGES
            phase = count // STAGES & 1
            count += 1
            stage = count % STAGES
            entry -= BLOCKS
            step0, step1 = _steps(row_list, k_steps, entry, kept, q_step)
            # here, as the compiler would carry rounded numbers one by one from turn to turn
            left0 = _left(p0, LEFT)
            left1 = _left(p1, LEFT)
            mbarrier.wait(k_ready.index(stage), count // STAGES & 1)
            mbarrier.wait(v_ready.index(before), phase)
            s0, s1 = _multiply(q, k_tiles, stage, magic)
            o = _accumulate(left0, left1, v_tiles, before, o)
            s0, s1 = warpgroup_mma_wait(2, [s0, s1])
            mbarrier.arrive(k_free.index(stage))
            s0 = s0.to(gl.float32, bitcast=True)
            s1 = s1.to(gl.float32, bitcast=True)
            m_new = gl.maximum(m, _largest(s0, s1, step0, step1))
            p0 = _weights(s0, step0, m_new)
            p1 = _weights(s1, step1, m_new)
            shrink = gl.exp2(m - m_new)
            m = m_new
            l = l * shrink + gl.sum(p0 + p1, 1)
            # as in kernels/block_sparse_hopper.py: it passes at once
            mbarrier.wait(v_ready.index(before), phase)
            o = warpgroup_mma_wait(0, [o])
            mbarrier.arrive(v_free.index(before))
            o = o * gl.convert_layout(shrink, OUT_ROW)[:, None]
        if MAP is not None:
            numbers = branch_numbers(branch, head, D)
        stage = count % STAGES
        mbarrier.wait(v_ready.index(stage), count // STAGES & 1)
        o = warpgroup_mma_wait(0, [_accumulate(_left(p0, LEFT), _left(p1, LEFT), v_tiles, stage, o)])
        mbarrier.arrive(v_free.index(stage))
        count += 1

        v_step = gl.load(v_step_ptr + head * D + gl.arange(0, D, COLUMN))
        inverse = gl.convert_layout(1 / l, OUT_ROW)
        if MAP is None:
            o = o * inverse[:, None] * v_step[None, :]
        else:
            exact = branch_queries(branch, group, parity, WIDE)
            o = gl.convert_layout(o * v_step[None, :], WIDE)
            inverse = gl.convert_layout(inverse, gl.SliceLayout(1, WIDE))
            o = add_branch(o, inverse, exact, numbers, branch, MAP)
        parity ^= 1
        # o of the tile before has left the buffer
        tma.store_wait(0)
        o_tile.reshape([HEIGHT, D]).store(o.to(o_tiles.dtype))
        fence_async_shared()
        first = tile % blocks * (GROUPS * HEIGHT) + group * HEIGHT
        tma_store(o_desc, [head // N, first, head % N * D], o_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=("kept", "L", "S", "N", "count"))
def attention_kernel(
    q_desc, k_desc, v_desc, o_desc, q_step_ptr, k_step_ptr, v_step_ptr,
    exact_desc, folded_desc, vectors_ptr, bias_ptr, list_ptr, kept, scale, L, S, N, count,
    STAGES: gl.constexpr, MAP: gl.constexpr,
):  # fmt: skip
    """o of `count` tiles; descriptors of (B, L or S, N D), and of values (B N blocks, D, keys).

    Where there is a MAP, with the linear branch, of the exact queries.
    """
    GROUPS: gl.constexpr = 2
    queries = (new_tiles(q_desc, GROUPS), new_barriers(1, 1).index(0), new_barriers(1, GROUPS).index(0))
    keys = (new_tiles(k_desc, STAGES * BLOCKS), new_barriers(STAGES, 1), new_barriers(STAGES, GROUPS))
    values = (new_tiles(v_desc, STAGES * BLOCKS), new_barriers(STAGES, 1), new_barriers(STAGES, GROUPS))
    outputs = (o_desc, new_tiles(o_desc, GROUPS))
    descs = (q_desc, k_desc, v_desc)
    steps_of = (q_step_ptr, k_step_ptr, v_step_ptr)
    work = (list_ptr, gl.program_id(0), count, gl.num_programs(0), kept, scale, L, S, N)
    branch = ()
    if MAP is not None:
        branch = new_branch(folded_desc, exact_desc, new_tiles(exact_desc, GROUPS), vectors_ptr, bias_ptr)
    gl.warp_specialize(
        [
            (_attend, (0, outputs, queries, keys, values, branch, steps_of, work, MAP)),
            (_attend, (1, outputs, queries, keys, values, branch, steps_of, work, MAP)),
            (_fill, (descs, queries, keys, values, branch, work, BLOCKS, True, MAP)),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOADER_REGISTERS],
    )


def options(form: Form, feature_map: str | None) -> dict[str, int | str | None]:
    """The compile-time arguments and launch options."""
    return {"STAGES": form.stages, "MAP": feature_map, "num_warps": 4, "maxnreg": 168}


def shapes(head_dim: int, block_k: int, dtype: torch.dtype) -> list[tuple[list[int], gl.NVMMASharedLayout]]:
    """Tiles that TMA moves, of queries, keys, values and outputs, and how they lie."""
    return [
        placed([1, ROWS, head_dim], gl.int8),
        placed([1, block_k, head_dim], gl.int8),
        placed([1, head_dim, block_k], gl.float8e4nv),
        placed([1, ROWS, head_dim], element(dtype)),
    ]


def launch(x: Quantised, o: Tensor, branch: Branch | None, index: Tensor, block_k: int, form: Form) -> None:
    """Fill o (B, L, N, D) with attention of x, whose values are paired, by packed lists, and the branch."""
    (B, L, N, D), S, blocks = o.shape, x.k.shape[1], math.prod(x.v.shape[:3])
    v = (x.v, [blocks, D, block_k], [D * block_k, block_k, 1])
    views = (packed(x.q), packed(x.k), v, packed(o))
    tiles = shapes(D, block_k, o.dtype)
    descs = [TensorDescriptor(*view, *tile) for view, tile in zip(views, tiles, strict=True)]
    exact = None if branch is None else TensorDescriptor(*packed(branch.q), *tiles[3])
    count = B * N * index.shape[2]
    sizes = (index.shape[3], 1 / math.sqrt(D), L, S, N, count)
    feature_map = None if branch is None else branch.feature_map
    given = (x.q_step, x.k_step, x.v_step, exact, *branch_arguments(branch), index)
    attention_kernel[(programs(count, form, o.device),)](*descs, *given, *sizes, **options(form, feature_map))
