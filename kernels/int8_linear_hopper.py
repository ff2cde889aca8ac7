"""The products of kernels/int8_linear_triton.py for Hopper GPUs, in Gluon, with their overlap spelt out.

A program walks over tiles of the outputs.  One warp loads, by TMA, DEPTH columns of the tile's rows of x and
of weights at a time; two warp groups multiply, half of the rows each.  They finish a tile - steps, bias and
the rest - by halves of its columns, one group while the other may still multiply, and the loader is ahead of
both by as many buffers as there are.

Barriers.  `count` numbers the loads of a program through all its tiles, which have buffer count % STAGES.
Its `ready` completes phase count // STAGES when TMA has written it, its `free` when both groups have read it;
who waits on a new barrier for parity 1, that of the phase before the first, passes.
"""

from functools import cache
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

from kernels.int8_linear_triton import GROUP, Finish, gelu
from kernels.tiles_hopper import new_barriers, new_tiles, tma_load, tma_store

# columns of a load, a row of which is 128 bytes
DEPTH = 128
# columns that a warp group multiplies at once: the most that Triton knows of integers
WIDTH = gl.constexpr(128)
# 12 warps (two groups of four, and four for the loader) have 168 registers each, before they trade them
LAUNCH = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": False}
TRADED_REGISTERS = gl.constexpr((240, 24))


class Form(NamedTuple):
    """A tile's rows and columns, buffers for loads, and rows of tiles that are computed together."""

    rows: int = 256
    columns: int = 128
    stages: int = 4
    group: int = GROUP


FORM = Form()


@gluon.jit
def _place(tile, down, within, across, GROUP: gl.constexpr, HEIGHT: gl.constexpr, WIDTH: gl.constexpr):
    """Row, part and column of a tile of the outputs, as product_kernel has them."""
    group = tile // (GROUP * across) * GROUP
    height = gl.minimum(down - group, GROUP)
    place = tile % (GROUP * across)
    part = place // height // within
    return (group + place % height) * HEIGHT, part, place // height % within * WIDTH


@gluon.jit
def _announce(ptr, row, column, M, N, HEIGHT: gl.constexpr, WIDTH: gl.constexpr):
    """Have a tile of a matrix of 16 bits brought to the cache, 128 bytes at a time, by one warp."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    for below in range(0, HEIGHT, 32):
        line = ptr + gl.minimum(row + below + lane, M - 1).to(gl.int64) * N
        for right in range(0, WIDTH, 64):
            gl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
                "=r,l",
                [(line + gl.minimum(column + right, N - 1)).to(gl.int64)],
                dtype=gl.int32,
                is_pure=False,
                pack=1,
            )


@gluon.jit
def _fill(descs, tiles, ready, free, add_ptr, work, GROUP: gl.constexpr):
    """The loading warp; what a tile is added to comes to the cache while it is multiplied."""
    x_desc, w_desc = descs
    x_tiles, w_tiles = tiles
    start, end, stride, steps, down, within, across, M, N = work
    STAGES: gl.constexpr = w_tiles.shape[0]
    ROWS: gl.constexpr = x_tiles.shape[1]
    COLUMNS: gl.constexpr = w_tiles.shape[1]
    DEPTH: gl.constexpr = x_tiles.shape[2]
    count = 0
    for tile in range(start, end, stride):
        row, part, column = _place(tile, down, within, across, GROUP, 2 * ROWS, COLUMNS)
        if add_ptr is not None:
            _announce(add_ptr, row, column, M, N, 2 * ROWS, COLUMNS)
        for step in range(steps):
            stage = count % STAGES
            mbarrier.wait(free.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(stage), 2 * x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            for i in gl.static_range(2):
                at = [row + i * ROWS, step * DEPTH]
                tma_load(x_desc, at, ready.index(stage), x_tiles.index(2 * stage + i))
            # what belongs to the next part lies right of this one's end, and is not stored
            tma_load(w_desc, [part * N + column, step * DEPTH], ready.index(stage), w_tiles.index(stage))
            count += 1


@gluon.jit
def _multiply(
    group, outputs, tiles, ready, free, others, work,
    GROUP: gl.constexpr, GELU: gl.constexpr, IS_ONE: gl.constexpr,
):  # fmt: skip
    """A warp group: its rows of every tile."""
    y_desc, y_tiles, height = outputs
    x_tiles, w_tiles = tiles
    x_step_ptr, w_step_ptr, bias_ptr, add_ptr, gate_ptr, every = others
    start, end, stride, steps, down, within, across, M, N = work
    STAGES: gl.constexpr = w_tiles.shape[0]
    ROWS: gl.constexpr = x_tiles.shape[1]
    COLUMNS: gl.constexpr = w_tiles.shape[1]
    HALF: gl.constexpr = COLUMNS // 2
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    HALVES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    y_tile = y_tiles.index(group)
    count = 0
    for tile in range(start, end, stride):
        first, part, column = _place(tile, down, within, across, GROUP, 2 * ROWS, COLUMNS)
        first += group * ROWS
        row = first + gl.arange(0, ROWS, gl.SliceLayout(1, HALVES))
        x_step = gl.load(x_step_ptr + row, row < M, other=0.0)
        sums = gl.zeros([ROWS, COLUMNS], gl.int32, SUMS)
        for step in range(steps):
            stage = count % STAGES
            mbarrier.wait(ready.index(stage), count // STAGES & 1)
            w = w_tiles.index(stage).permute([1, 0])
            sums = warpgroup_mma(x_tiles.index(2 * stage + group), w, sums, is_async=True)
            # one stays in flight: the product before has read its buffer
            sums = warpgroup_mma_wait(1, [sums])
            mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), pred=step > 0)
            count += 1
        sums = warpgroup_mma_wait(0, [sums])
        mbarrier.arrive(free.index((count + STAGES - 1) % STAGES))
        halves = sums.reshape([ROWS, 2, HALF]).permute([0, 2, 1]).split()
        for i in gl.static_range(2):
            at = column + i * HALF + gl.arange(0, HALF, gl.SliceLayout(0, HALVES))
            channel = part * N + at
            y = gl.convert_layout(halves[i], HALVES).to(gl.float32) * x_step[:, None]
            y = y * gl.load(w_step_ptr + channel, at < N, other=0.0)[None, :]
            if bias_ptr is not None:
                y += gl.load(bias_ptr + channel, at < N, other=0.0).to(gl.float32)[None, :]
            if GELU:
                y = gelu(y)
            inside = (row < M)[:, None] & (at < N)[None, :]
            if gate_ptr is not None:
                if IS_ONE:
                    y *= gl.load(gate_ptr + at, at < N, other=0.0)[None, :]
                else:
                    gate_row = (row // every).to(gl.int64)[:, None] * N
                    y *= gl.load(gate_ptr + gate_row + at[None, :], inside, other=0.0)
            if add_ptr is not None:
                add = gl.load(add_ptr + (row.to(gl.int64)[:, None] * N + at[None, :]), inside, other=0.0)
                y += add.to(gl.float32)
            # the half before has left the buffer
            tma.store_wait(0)
            y_tile.store(y.to(y_tiles.dtype))
            fence_async_shared()
            tma_store(y_desc, [part * height + first, column + i * HALF], y_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=("M", "height", "every"))
def product_kernel(
    x_desc, w_desc, y_desc, x_step_ptr, w_step_ptr, bias_ptr, add_ptr, gate_ptr, M, N, K, height, every,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
    GELU: gl.constexpr, IS_ONE: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """As of kernels/int8_linear_triton.py; descriptors of matrices, y's of (PARTS height, N)."""
    COLUMNS: gl.constexpr = w_desc.block_type.shape[0]
    HEIGHT: gl.constexpr = 2 * x_desc.block_type.shape[0]
    tiles = (new_tiles(x_desc, 2 * STAGES), new_tiles(w_desc, STAGES))
    ready, free = new_barriers(STAGES, 1), new_barriers(STAGES, 2)
    outputs = (y_desc, new_tiles(y_desc, 2), height)
    others = (x_step_ptr, w_step_ptr, bias_ptr, add_ptr, gate_ptr, every)
    down = gl.cdiv(M, HEIGHT)
    within = gl.cdiv(N, COLUMNS)
    across = PARTS * within
    steps = gl.cdiv(K, x_desc.block_type.shape[1])
    work = (gl.program_id(0), down * across, gl.num_programs(0), steps, down, within, across, M, N)
    gl.warp_specialize(
        [
            (_multiply, (0, outputs, tiles, ready, free, others, work, GROUP, GELU, IS_ONE)),
            (_multiply, (1, outputs, tiles, ready, free, others, work, GROUP, GELU, IS_ONE)),
            (_fill, ((x_desc, w_desc), tiles, ready, free, add_ptr, work, GROUP)),
        ],
        [4, 1],
        TRADED_REGISTERS,
    )


def options(form: Form, finish: Finish) -> dict[str, int | bool]:
    """The compile-time arguments and launch options."""
    return {
        "STAGES": form.stages,
        "GROUP": form.group,
        "GELU": finish.gelu,
        "IS_ONE": finish.gates == "one",
        "PARTS": finish.parts,
        **LAUNCH,
    }


@cache  # finding layouts takes some 30 us, as long as a small product does
def shapes(form: Form, dtype: torch.dtype) -> list[tuple[list[int], gl.NVMMASharedLayout]]:
    """Tiles that TMA moves, of x, weights and outputs, and how they lie."""
    output = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    rows = form.rows // 2
    kinds = ([rows, DEPTH], gl.int8), ([form.columns, DEPTH], gl.int8), ([rows, form.columns // 2], output)
    return [(shape, gl.NVMMASharedLayout.get_default_for(shape, kind)) for shape, kind in kinds]


def launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    others: tuple[Tensor | None, ...],
    every: int,
    programs: int,
    form: Form,
    finish: Finish,
) -> None:
    """Fill y (parts, height, N) from contiguous x (M, K), weight (parts N, K) and the kernel's pointers."""
    (M, K), (_, height, N) = x.shape, y.shape
    tiles = zip((x, weight, y.flatten(0, 1)), shapes(form, y.dtype), strict=True)
    descs = [
        TensorDescriptor(matrix, list(matrix.shape), [matrix.shape[1], 1], *tile) for matrix, tile in tiles
    ]
    product_kernel[(programs,)](*descs, *others, M, N, K, height, every, **options(form, finish))
