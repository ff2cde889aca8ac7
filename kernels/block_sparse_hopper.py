"""The forward of block-sparse attention for Hopper GPUs, in Gluon: the portable one, its overlap spelt out.

A program walks over tiles: a block of query rows of a head each.  One warp loads, by TMA; a warp group for
every 64 rows multiplies.  The blocks of a list are gathered into steps of KEYS keys, the last blocks first,
so that only the first step has keys to mask: those past the end of the sequence and, where the list ends
within the step, its last block once more.  In a turn of the loop

    S = Q K'    and the step before's    O += P V

start together, and P = exp(S) and its row sums run under the second product and the other warp group's.
ptxas keeps products in flight only if none is left pending from one turn of the loop to the next.

Barriers.  `count` numbers the steps of a program through all its tiles.  The keys of step c have buffer
c % STAGES of theirs, and so have the values.  A buffer's `ready` completes phase c // STAGES when TMA has
written it, its `free` when every warp group has read it; who waits on a new barrier for parity 1, that of
the phase before the first, passes.  Queries have one buffer, whose phases count tiles.  The loader fills in
the order of reading, K0, Q, K1, V0, K2, V1, ..., V of the last step, and waits only for reads of what it has
filled, which wait for nothing that comes later.  With a linear branch, which a tile ends with, its buffers
come before V of the last step.
"""

import math
from typing import NamedTuple

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

from kernels.linear_attention_hopper import (
    add_branch,
    branch_numbers,
    branch_queries,
    fetch_branch,
    new_branch,
)
from kernels.linear_attention_triton import Branch
from kernels.tiles_hopper import new_barriers, new_tiles, tma_load, tma_store

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
# rows that one warp group multiplies at once
ROWS = 64
# bytes of a row of what TMA writes in one piece, as products read it
PIECE = 128
# of a thread, after warps have traded them; the first warp group takes what is left, no less than the second
GROUP_REGISTERS, LOADER_REGISTERS = gl.constexpr(240), gl.constexpr(24)


class Form(NamedTuple):
    """Keys of a step, buffers for steps, and programs a multiprocessor."""

    keys: int
    stages: int
    programs: int


# in 16 bits, by the rows of a block of queries, made for D = 128
FORMS = {128: Form(128, 2, 1), 64: Form(64, 2, 2)}


@gluon.jit
def _fetch(desc, ring, place, listed, step, count, BLOCKS: gl.constexpr, ACROSS: gl.constexpr):
    """The blocks of a step, cut into pieces of columns, as _matrices has them.

    ACROSS: a block is a matrix of its own, whose columns are keys; place: the first one's, and 0.
    """
    tiles, ready, free = ring
    batch, column = place
    list_ptr, kept = listed
    STAGES: gl.constexpr = ready.shape[0]
    PIECES: gl.constexpr = tiles.shape[0] // (STAGES * BLOCKS)
    stage = count % STAGES
    mbarrier.wait(free.index(stage), (count // STAGES & 1) ^ 1)
    mbarrier.expect(ready.index(stage), BLOCKS * PIECES * desc.block_type.nbytes)
    first = (gl.cdiv(kept, BLOCKS) - 1 - step) * BLOCKS
    for block in gl.static_range(BLOCKS):
        listed_block = gl.load(list_ptr + gl.minimum(first + block, kept - 1))
        for piece in gl.static_range(PIECES):
            if ACROSS:
                at = [batch + listed_block, column, 0]
            else:
                at = [batch, listed_block * tiles.shape[2], column + piece * tiles.shape[3]]
            tile = tiles.index((stage * PIECES + piece) * BLOCKS + block)
            tma_load(desc, at, ready.index(stage), tile)


@gluon.jit
def _fill(
    descs, queries, keys, values, branch, work, BLOCKS: gl.constexpr, ACROSS: gl.constexpr, MAP: gl.constexpr
):
    """The loading warp: the queries of every tile, and keys and values as their buffers fall free.

    ACROSS: in 8 bits.  Values are (B N blocks, D, keys of a block), and not like keys; the linear branch has
    queries of its own.
    """
    q_desc, k_desc, v_desc = descs
    q_tiles, q_ready, q_free = queries
    list_ptr, start, end, stride, kept, _, L, S, N = work
    GROUPS: gl.constexpr = q_tiles.shape[0]
    ROWS: gl.constexpr = q_tiles.shape[2]
    steps = gl.cdiv(kept, BLOCKS)
    blocks = gl.cdiv(L, GROUPS * ROWS)
    v_tiles, _, _ = values
    parity = 0
    count = 0
    for tile in range(start, end, stride):
        head = tile // blocks
        first = tile % blocks * (GROUPS * ROWS)
        place = (head // N, head % N * q_tiles.shape[3])
        v_place = (head * gl.cdiv(S, v_tiles.shape[3]), 0) if ACROSS else place
        listed = (list_ptr + tile.to(gl.int64) * kept, kept)
        _fetch(k_desc, keys, place, listed, 0, count, BLOCKS, False)
        mbarrier.wait(q_free, parity ^ 1)
        mbarrier.expect(q_ready, GROUPS * q_desc.block_type.nbytes)
        for group in gl.static_range(GROUPS):
            tma_load(q_desc, [place[0], first + group * ROWS, place[1]], q_ready, q_tiles.index(group))
        for step in range(1, steps):
            _fetch(k_desc, keys, place, listed, step, count + step, BLOCKS, False)
            _fetch(v_desc, values, v_place, listed, step - 1, count + step - 1, BLOCKS, ACROSS)
        count += steps
        if MAP is not None:
            fetch_branch(branch, head, place, first, parity, ACROSS)
        _fetch(v_desc, values, v_place, listed, steps - 1, count - 1, BLOCKS, ACROSS)
        parity ^= 1


@gluon.jit
def _matrices(tiles, STAGES: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr):
    """The buffers of a ring as matrices: pieces of columns of all keys lie one after the other."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], tiles.dtype)
    return tiles._reinterpret(tiles.dtype, [STAGES, KEYS, D], layout)


@gluon.jit
def _attend(group, outputs, queries, keys, values, branch, work, KEYS: gl.constexpr, MAP: gl.constexpr):
    """A warp group: its rows of every tile against the keys listed for them."""
    o_desc, o_tiles, lse_ptr = outputs
    q_tiles, q_ready, q_free = queries
    k_tiles, k_ready, k_free = keys
    v_tiles, v_ready, v_free = values
    list_ptr, start, end, stride, kept, scale, L, S, N = work
    GROUPS: gl.constexpr = q_tiles.shape[0]
    # with steps of 64 keys there are registers for queries too
    HELD: gl.constexpr = KEYS == 64
    ROWS: gl.constexpr = q_tiles.shape[2]
    D: gl.constexpr = q_tiles.shape[3]
    BLOCK_K: gl.constexpr = k_tiles.shape[2]
    BLOCKS: gl.constexpr = KEYS // BLOCK_K
    STAGES: gl.constexpr = k_ready.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)

    steps = gl.cdiv(kept, BLOCKS)
    blocks = gl.cdiv(L, GROUPS * ROWS)
    k_matrices = _matrices(k_tiles, STAGES, KEYS, D)
    v_matrices = _matrices(v_tiles, STAGES, KEYS, D)
    o_tile = o_tiles.index(group)
    zero = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    parity = 0
    count = 0
    for tile in range(start, end, stride):
        last = gl.load(list_ptr + tile.to(gl.int64) * kept + kept - 1)
        present = (kept - 1) % BLOCKS * BLOCK_K + gl.minimum(S - last * BLOCK_K, BLOCK_K)
        mbarrier.wait(q_ready, parity)
        q = q_tiles.index(group).reshape([ROWS, D])
        if HELD:
            q = q.load(gl.DotOperandLayout(0, SCORES, 2))
            mbarrier.arrive(q_free)
        stage = count % STAGES
        mbarrier.wait(k_ready.index(stage), count // STAGES & 1)
        s = warpgroup_mma(q, k_matrices.index(stage).permute([1, 0]), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_free.index(stage))
        key = gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
        s = gl.where((key < present)[None, :], s, -float("inf"))
        # the list's last block has a key at least, so m is finite
        m = gl.max(s, 1) * (scale * LOG2E)
        p = gl.exp2(s * (scale * LOG2E) - m[:, None])
        l = gl.sum(p, 1)
        o = gl.zeros([ROWS, D], gl.float32, OUT)
        left = gl.convert_layout(p.to(k_tiles.dtype), LEFT)
        for _ in range(1, steps):
            before = count % STAGES
            phase = count // STAGES & 1
            count += 1
            stage = count % STAGES
            mbarrier.wait(k_ready.index(stage), count // STAGES & 1)
            mbarrier.wait(v_ready.index(before), phase)
            s = warpgroup_mma(q, k_matrices.index(stage).permute([1, 0]), zero, use_acc=False, is_async=True)
            o = warpgroup_mma(left, v_matrices.index(before), o, is_async=True)
            s = warpgroup_mma_wait(1, [s])
            mbarrier.arrive(k_free.index(stage))
            m_new = gl.maximum(m, gl.max(s, 1) * (scale * LOG2E))
            p = gl.exp2(s * (scale * LOG2E) - m_new[:, None])
            shrink = gl.exp2(m - m_new)
            m = m_new
            l = l * shrink + gl.sum(p, 1)
            left = gl.convert_layout(p.to(k_tiles.dtype), LEFT)
            # passes at once, as the buffer is not free yet: ptxas moves no wait for products across it, and
            # would else wait before the arithmetic above
            mbarrier.wait(v_ready.index(before), phase)
            o = warpgroup_mma_wait(0, [o])
            mbarrier.arrive(v_free.index(before))
            o = o * gl.convert_layout(shrink, OUT_ROW)[:, None]
        head = tile // blocks
        if MAP is not None:
            numbers = branch_numbers(branch, head, D)
        elif not HELD:
            mbarrier.arrive(q_free)
        stage = count % STAGES
        mbarrier.wait(v_ready.index(stage), count // STAGES & 1)
        o = warpgroup_mma(left, v_matrices.index(stage), o, is_async=True)
        o = warpgroup_mma_wait(0, [o])
        mbarrier.arrive(v_free.index(stage))
        count += 1

        first = tile % blocks * (GROUPS * ROWS) + group * ROWS
        if lse_ptr is not None:
            row = first + gl.arange(0, ROWS, ROW)
            gl.store(lse_ptr + head.to(gl.int64) * L + row, (m + gl.log2(l)) * LN2, row < L)
        inverse = gl.convert_layout(1 / l, OUT_ROW)
        if MAP is None:
            o = o * inverse[:, None]
        else:
            q_again = branch_queries(branch, group, parity, OUT)
            mbarrier.arrive(q_free)
            o = add_branch(o, inverse, q_again, numbers, branch, MAP)
        parity ^= 1
        # o of the tile before has left the buffer
        tma.store_wait(0)
        o_tile.reshape([ROWS, D]).store(o.to(k_tiles.dtype))
        fence_async_shared()
        tma_store(o_desc, [head // N, first, head % N * D], o_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=("kept", "L", "S", "N", "count"))
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, folded_desc, vectors_ptr, bias_ptr, list_ptr,
    kept, scale, L, S, N, count,
    GROUPS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, MAP: gl.constexpr,
):  # fmt: skip
    """o of `count` tiles; descriptors of (B, L or S, N D) in tiles of `shapes`.

    With it go either its log-sum-exp or, where there is a MAP, the linear branch.
    """
    PIECES: gl.constexpr = q_desc.block_type.shape[2] // k_desc.block_type.shape[2]
    BLOCKS: gl.constexpr = KEYS // k_desc.block_type.shape[1]
    RING: gl.constexpr = STAGES * PIECES * BLOCKS
    queries = (new_tiles(q_desc, GROUPS), new_barriers(1, 1).index(0), new_barriers(1, GROUPS).index(0))
    keys = (new_tiles(k_desc, RING), new_barriers(STAGES, 1), new_barriers(STAGES, GROUPS))
    values = (new_tiles(v_desc, RING), new_barriers(STAGES, 1), new_barriers(STAGES, GROUPS))
    outputs = (o_desc, new_tiles(o_desc, GROUPS), lse_ptr)
    descs = (q_desc, k_desc, v_desc)
    work = (list_ptr, gl.program_id(0), count, gl.num_programs(0), kept, scale, L, S, N)
    branch = ()
    if MAP is not None:
        branch = new_branch(folded_desc, q_desc, queries[0], vectors_ptr, bias_ptr)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_attend, (0, outputs, queries, keys, values, branch, work, KEYS, MAP)),
                (_fill, (descs, queries, keys, values, branch, work, BLOCKS, False, MAP)),
            ],
            [1],
            [LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (0, outputs, queries, keys, values, branch, work, KEYS, MAP)),
                (_attend, (1, outputs, queries, keys, values, branch, work, KEYS, MAP)),
                (_fill, (descs, queries, keys, values, branch, work, BLOCKS, False, MAP)),
            ],
            [4, 1],
            [GROUP_REGISTERS, LOADER_REGISTERS],
        )


def options(form: Form, block_q: int, feature_map: str | None) -> dict[str, int | str | None]:
    """The compile-time arguments and launch options."""
    groups = block_q // ROWS
    # the loader's warp comes with the registers of four
    threads = 128 * (groups + 1)
    return {
        "GROUPS": groups,
        "KEYS": form.keys,
        "STAGES": form.stages,
        "MAP": feature_map,
        "num_warps": 4,
        "maxnreg": 65536 // (form.programs * threads) // 8 * 8,
    }


def shapes(head_dim: int, block_k: int, dtype: torch.dtype) -> list[tuple[list[int], gl.NVMMASharedLayout]]:
    """Tiles that TMA moves, of queries, keys, values and outputs, and how they lie."""
    q = placed([1, ROWS, head_dim], element(dtype))
    k = placed([1, block_k, min(head_dim, PIECE // dtype.itemsize)], element(dtype))
    return [q, k, k, q]


def placed(shape: list[int], kind: gl.dtype) -> tuple[list[int], gl.NVMMASharedLayout]:
    """A tile and how it lies."""
    return shape, gl.NVMMASharedLayout.get_default_for(shape, kind)


def packed(x: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """(B, L, N, D), its shape and strides as (B, L, N D), those of dimensions of one element too."""
    B, L, N, D = x.shape
    return x, [B, L, N * D], [L * N * D, N * D, 1]


def element(dtype: torch.dtype) -> gl.dtype:
    """Gluon's name of a dtype of 16 bits."""
    return {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]


def programs(count: int, form: Form, device: torch.device) -> int:
    """How many are launched for that many tiles: as many as the multiprocessors hold at a time."""
    return min(count, form.programs * torch.cuda.get_device_properties(device).multi_processor_count)


def launch(
    tensors: tuple[Tensor, ...],
    lse: Tensor | None,
    branch: Branch | None,
    index: Tensor,
    block_q: int,
    block_k: int,
    form: Form,
) -> None:
    """Fill o (B, L, N, D), the last of packed q, k, v, o (B, L or S, N, D), and either lse or o's rest.

    lse (B, N, L), fp32; branch: is added to o.  index: packed, int32, (B, N, query blocks, kept).  A block of
    queries has ROWS rows or, as it must with a branch, twice as many.
    """
    (B, L, N, D), S = tensors[0].shape, tensors[1].shape[1]
    tiles = shapes(D, block_k, tensors[0].dtype)
    descs = [TensorDescriptor(*packed(x), *tile) for x, tile in zip(tensors, tiles, strict=True)]
    count = B * N * index.shape[2]
    sizes = (index.shape[3], 1 / math.sqrt(D), L, S, N, count)
    feature_map = None if branch is None else branch.feature_map
    forward_kernel[(programs(count, form, index.device),)](
        *descs, lse, *branch_arguments(branch), index, *sizes, **options(form, block_q, feature_map)
    )


def branch_arguments(branch: Branch | None) -> tuple[TensorDescriptor | Tensor | None, ...]:
    """The kernels' folded_desc, vectors_ptr and bias_ptr."""
    if branch is None:
        return None, None, None
    x = branch.folded
    desc = TensorDescriptor(x, [*x.shape], [*x.stride()], *square(x.shape[-1], x.dtype))
    return desc, branch.vectors, branch.bias


def square(head_dim: int, dtype: torch.dtype) -> tuple[list[int], gl.NVMMASharedLayout]:
    """The tile of a folded state."""
    return placed([1, head_dim, head_dim], element(dtype))
