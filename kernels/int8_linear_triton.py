"""Triton kernels of kernels/int8_linear.py: products of int8 matrices with their steps."""

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tiles import HAS_GLUON, LOG2E, allow_descriptors

# twice sqrt(2 / pi), of tanh's GELU, as a power of 2
GELU_SLOPE = tl.constexpr(-1.5957691216057308 * LOG2E.value)
# rows of tiles that are computed together, so that they share what they read of the weights
GROUP = 8
# descriptors take rows of a multiple of so many bytes
ALIGNMENT = 16


class Form(NamedTuple):
    """How products are laid out: a tile's rows, columns and depth, warps, stages of the load pipeline.

    tma: loads and stores by descriptors, each program computing one tile after another.  halves: a tile is
    finished by halves of its columns, which leaves registers and shared memory.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    tma: bool = False
    halves: bool = False


class Finish(NamedTuple):
    """What becomes of the sums of a tile, beside steps and bias.

    add: added to other numbers, times a gate if there is one: of one row for all, or of many, for some each.
    parts: as many weights one under another, each with outputs of its own.
    """

    gelu: bool = False
    add: bool = False
    gates: Literal["no", "one", "many"] = "no"
    parts: int = 1


# tests/kernels/test_int8_linear_compile.py holds them to limits
PORTABLE = Form(128, 128, 64, 8, 4)
HOPPER = Form(128, 256, 128, 8, 4, tma=True, halves=True)


def forms_for(capability: int, aligned: bool) -> list[NamedTuple]:
    """What runs on a GPU of that capability, 90 for 9.0; best first.  aligned: as takes_descriptors says.

    One that is no Form is of the kernel in kernels/int8_linear_hopper.py.
    """
    if capability != 90 or not aligned:
        return [PORTABLE]
    if not HAS_GLUON:
        return [HOPPER, PORTABLE]
    from kernels.int8_linear_hopper import FORM

    return [FORM, HOPPER, PORTABLE]


def takes_descriptors(x: Tensor, weight: Tensor, dtype: torch.dtype, add: Tensor | None, parts: int) -> bool:
    """Whether rows of x, weight and 16-bit outputs and what they are added to lie as descriptors demand."""
    sizes = (x.shape[1], 2 * weight.shape[0] // parts)
    starts = (t.data_ptr() for t in (x, weight, add) if t is not None)
    return dtype.itemsize == 2 and not any(size % ALIGNMENT for size in (*sizes, *starts))


@triton.jit
def _matrix(ptr, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """What _load and _store take, of a matrix (M, N) by tiles [ROWS, COLUMNS]."""
    if TMA:
        ptr = tl.make_tensor_descriptor(ptr, [M, N], [N, 1], [ROWS, COLUMNS])
    return ptr


@triton.jit
def _address(ptr, row, column, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to a tile of a matrix (M, N), and which of it lie inside."""
    below = tl.arange(0, ROWS)[:, None]
    right = column + tl.arange(0, COLUMNS)[None, :]
    return ptr + row.to(tl.int64) * N + (below * N + right), (row + below < M) & (right < N)


@triton.jit
def _load(x, row, column, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """A tile of a matrix; zeros outside."""
    if TMA:
        tile = x.load([row, column])
    else:
        ptr, mask = _address(x, row, column, M, N, ROWS, COLUMNS)
        tile = tl.load(ptr, mask=mask, other=0)
    return tile  # [ROWS, COLUMNS]


@triton.jit
def _store(y, tile, row, column, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """The opposite of _load, rounded to what y holds."""
    if TMA:
        y.store([row, column], tile.to(y.dtype))
    else:
        ptr, mask = _address(y, row, column, M, N, ROWS, COLUMNS)
        tl.store(ptr, tile.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _split(tile, HALVES: tl.constexpr):
    """A tile, or its left and its right half."""
    if HALVES:
        halves = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
        tiles = tl.split(tl.permute(halves, [0, 2, 1]))
    else:
        tiles = (tile,)
    return tiles


@triton.jit
def gelu(y):
    """By tanh."""
    # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)), which loses nothing where it is small
    return y / (1.0 + tl.exp2((y + 0.044715 * y * y * y) * GELU_SLOPE))


@triton.jit(do_not_specialize=("M", "HEIGHT", "EVERY"))
def product_kernel(
    x_ptr, w_ptr, x_step_ptr, w_step_ptr, bias_ptr, add_ptr, gate_ptr, y_ptr, M, N, K, HEIGHT, EVERY,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr,
    HALVES: tl.constexpr, GROUP: tl.constexpr, GELU: tl.constexpr, IS_ONE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """y (PARTS, HEIGHT, N), of which M rows count, of int8 x (M, K) and w (PARTS, N, K) in their rows' steps.

    bias (PARTS, N), or None.  gate (M / EVERY, N), or None, times that; IS_ONE: (1, N).  add (M, N), or None.
    """
    WIDTH: tl.constexpr = COLUMNS // 2 if HALVES else COLUMNS
    x_tiles = _matrix(x_ptr, M, K, ROWS, DEPTH, TMA)
    w_tiles = _matrix(w_ptr, PARTS * N, K, COLUMNS, DEPTH, TMA)
    y_tiles = _matrix(y_ptr, PARTS * HEIGHT, N, ROWS, WIDTH, TMA)
    add_tiles = y_tiles if add_ptr is None else _matrix(add_ptr, M, N, ROWS, WIDTH, TMA)
    down = tl.cdiv(M, ROWS)
    within = tl.cdiv(N, COLUMNS)
    across = PARTS * within
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0)):
        group = tile // (GROUP * across) * GROUP
        height = tl.minimum(down - group, GROUP)
        place = tile % (GROUP * across)
        row = (group + place % height) * ROWS
        part = place // height // within
        first = place // height % within * COLUMNS
        sums = tl.zeros([ROWS, COLUMNS], tl.int32)
        for k in range(0, K, DEPTH):
            x = _load(x_tiles, row, k, M, K, ROWS, DEPTH, TMA)
            # what belongs to the next part lies right of this one's end, and is not stored
            w = _load(w_tiles, part * N + first, k, PARTS * N, K, COLUMNS, DEPTH, TMA)
            sums = tl.dot(x, w.T, sums, out_dtype=tl.int32)
        rows = row + tl.arange(0, ROWS)
        x_step = tl.load(x_step_ptr + rows, mask=rows < M, other=0.0)
        halves = _split(sums, HALVES)
        for i in tl.static_range(len(halves)):
            column = first + i * WIDTH
            columns = column + tl.arange(0, WIDTH)
            channels = part * N + columns
            w_step = tl.load(w_step_ptr + channels, mask=columns < N, other=0.0)
            y = halves[i].to(tl.float32) * x_step[:, None] * w_step[None, :]
            if bias_ptr is not None:
                y += tl.load(bias_ptr + channels, mask=columns < N, other=0.0).to(tl.float32)[None, :]
            if GELU:
                y = gelu(y)
            if gate_ptr is not None:
                if IS_ONE:
                    y *= tl.load(gate_ptr + columns, mask=columns < N, other=0.0)[None, :]
                else:
                    gate_row = (rows // EVERY).to(tl.int64)[:, None] * N
                    inside = (rows < M)[:, None] & (columns < N)[None, :]
                    y *= tl.load(gate_ptr + (gate_row + columns[None, :]), mask=inside, other=0.0)
            if add_ptr is not None:
                y += _load(add_tiles, row, column, M, N, ROWS, WIDTH, TMA).to(tl.float32)
            above = part * HEIGHT
            _store(y_tiles, y, above + row, column, above + M, N, ROWS, WIDTH, TMA)


def product_options(form: Form, finish: Finish) -> dict[str, int | bool]:
    """The compile-time arguments and launch options of product_kernel."""
    return {
        "ROWS": form.rows,
        "COLUMNS": form.columns,
        "DEPTH": form.depth,
        "TMA": form.tma,
        "HALVES": form.halves,
        "GROUP": GROUP,
        "GELU": finish.gelu,
        "IS_ONE": finish.gates == "one",
        "PARTS": finish.parts,
        "num_warps": form.warps,
        "num_stages": form.stages,
        "enable_fp_fusion": False,
    }


def product(
    x: Tensor,
    x_step: Tensor,
    weight: Tensor,
    weight_step: Tensor,
    bias: Tensor | None,
    add: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    dtype: torch.dtype,
    finish: Finish,
    form: NamedTuple,
) -> tuple[Tensor, ...]:
    """Of x (M, K) and weight (parts N, K) in their steps, plus bias -> (M, N) in dtype for each part."""
    x, x_step, weight, weight_step = (t.contiguous() for t in (x, x_step, weight, weight_step))
    bias, add, gate = (None if t is None else t.contiguous() for t in (bias, add, gate))
    (M, K), N = x.shape, weight.shape[0] // finish.parts
    down = triton.cdiv(M, form.rows)
    # a last tile of rows that is not a whole one must not reach into the next part
    height = M if finish.parts == 1 else down * form.rows
    y = torch.empty(finish.parts, height, N, dtype=dtype, device=x.device)
    programs = down * finish.parts * triton.cdiv(N, form.columns)
    every = 1 if gate is None else M // gate.shape[0]
    if x.is_cuda and (not isinstance(form, Form) or form.tma):
        # each computes one tile after another
        programs = min(programs, torch.cuda.get_device_properties(x.device).multi_processor_count)
    others = x_step, weight_step, bias, add, gate
    with torch.cuda.device_of(x):
        if not isinstance(form, Form):
            from kernels import int8_linear_hopper

            int8_linear_hopper.launch(x, weight, y, others, every, programs, form, finish)
        else:
            allow_descriptors(x.device)
            options = product_options(form, finish)
            product_kernel[(programs,)](x, weight, *others, y, M, N, K, height, every, **options)
    return y[:, :M].unbind(0)
