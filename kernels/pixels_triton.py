"""Triton kernels of kernels/pixels.py: a frame's pixels are rows [C], a tile of them to a program.

Rows are tuples of tiles [ROWS, CHUNK] side by side, so that widths of a few times a power of two, as Wan's
are, leave no thread idle.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference_pixels

EPS = tl.constexpr(reference_pixels.EPS)
# numbers of a program: with more, too few programs fit a multiprocessor to hide what they wait for
HELD = 8192
# columns of a tile: most, and fewest of one that only divides the width
LARGEST, SMALLEST = 256, 32


def options(C: int) -> dict[str, int]:
    """The compile-time arguments and launch options of every kernel, for rows of C."""
    divisor = min(LARGEST, C & -C)
    chunk = divisor if divisor >= SMALLEST else min(LARGEST, triton.next_power_of_2(C))
    rows = max(1, triton.next_power_of_2(HELD // C + 1) // 2)
    return {"C": C, "CHUNK": chunk, "ROWS": min(64, rows), "num_warps": 4}


@triton.jit
def _load(ptr, i, left, C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """Tile i of the first rows from ptr, zeros beyond the `left` of them and beyond their ends."""
    row, column = tl.arange(0, ROWS)[:, None], i * CHUNK + tl.arange(0, CHUNK)[None, :]
    mask = row < left if C % CHUNK == 0 else (row < left) & (column < C)
    return tl.load(ptr + row * C + column, mask=mask, other=0.0)  # [ROWS, CHUNK]


@triton.jit
def _store(ptr, tile, i, step, left, C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """The opposite of _load, to every step-th row, rounded to what ptr points to."""
    row, column = tl.arange(0, ROWS)[:, None], i * CHUNK + tl.arange(0, CHUNK)[None, :]
    mask = row < left if C % CHUNK == 0 else (row < left) & (column < C)
    tl.store(ptr + row * (step * C) + column, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_row(ptr, i, C: tl.constexpr, CHUNK: tl.constexpr):
    """Part i of what all rows share."""
    column = i * CHUNK + tl.arange(0, CHUNK)
    part = tl.load(ptr + column) if C % CHUNK == 0 else tl.load(ptr + column, mask=column < C, other=0.0)
    return part.to(tl.float32)[None, :]  # [1, CHUNK]


@triton.jit
def _load_biased(ptr, bias_ptr, i, left, C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    tile = _load(ptr, i, left, C, CHUNK, ROWS).to(tl.float32)
    return tile if bias_ptr is None else tile + _load_row(bias_ptr, i, C, CHUNK)


@triton.jit(do_not_specialize=("pixels", "past"))
def norm_kernel(
    x_ptr, bias_ptr, gamma_ptr, before_ptr, y_ptr, pixels, past,
    C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y (B, past + T, pixels, C): first before (B, past, ...), then SiLU of the norm of x (B, T, ...) + bias.

    A program of the grid (., past + T, B) has ROWS pixels of one frame of y.
    """
    first, frame, sample = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    frames, left = tl.num_programs(1), pixels - first
    y_ptr += ((sample * frames + frame) * pixels + first) * C
    if frame < past:
        before_ptr += ((sample * past + frame) * pixels + first) * C
        for i in tl.static_range((C + CHUNK - 1) // CHUNK):
            _store(y_ptr, _load(before_ptr, i, left, C, CHUNK, ROWS), i, 1, left, C, CHUNK, ROWS)
    else:
        x_ptr += ((sample * (frames - past) + frame - past) * pixels + first) * C
        tiles = ()
        total = tl.zeros([ROWS], tl.float32)
        for i in tl.static_range((C + CHUNK - 1) // CHUNK):
            tile = _load_biased(x_ptr, bias_ptr, i, left, C, CHUNK, ROWS)
            tiles += (tile,)
            total += tl.sum(tile * tile, 1)
        # of a NaN and a number, maximum takes the number unless told
        size = tl.maximum(tl.sqrt(total), EPS, propagate_nan=tl.PropagateNan.ALL)
        scale = tl.sqrt(C + 0.0) / size
        for i in tl.static_range(len(tiles)):
            tile = tiles[i] * scale[:, None] * _load_row(gamma_ptr, i, C, CHUNK)
            _store(y_ptr, tile / (1 + tl.exp(-tile)), i, 1, left, C, CHUNK, ROWS)


@triton.jit(do_not_specialize=("pixels",))
def add_kernel(
    x_ptr, bias_ptr, y_ptr, out_ptr, pixels,
    C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x + bias + y, of rows of x and y (pixels, C)."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    left, place = pixels - first, first * C
    for i in tl.static_range((C + CHUNK - 1) // CHUNK):
        tile = _load_biased(x_ptr + place, bias_ptr, i, left, C, CHUNK, ROWS)
        tile += _load(y_ptr + place, i, left, C, CHUNK, ROWS)
        _store(out_ptr + place, tile, i, 1, left, C, CHUNK, ROWS)


@triton.jit(do_not_specialize=("width",))
def enlarge_kernel(
    x_ptr, y_ptr, width, C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each pixel of x (lines, width, C) to four of y (2 lines, 2 width, C).

    A program has ROWS pixels of one line of x.
    """
    parts = (width + ROWS - 1) // ROWS
    line, first = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts * ROWS
    left = width - first
    x_ptr += (line * width + first) * C
    # two lines of y, each of twice the width
    y_ptr += (line * 4 * width + first * 2) * C
    for i in tl.static_range((C + CHUNK - 1) // CHUNK):
        tile = _load(x_ptr, i, left, C, CHUNK, ROWS)
        for below in tl.static_range(2):
            place = y_ptr + below * 2 * width * C
            _store(place, tile, i, 2, left, C, CHUNK, ROWS)
            _store(place + C, tile, i, 2, left, C, CHUNK, ROWS)


def norm_silu(x: Tensor, bias: Tensor | None, gamma: Tensor, before: Tensor) -> Tensor:
    """By norm_kernel."""
    x, before = _rows(x), _rows(before)
    (B, T, H, W, C), past, constants = x.shape, before.shape[1], options(x.shape[-1])
    y = x.new_empty(B, past + T, H, W, C)
    grid = triton.cdiv(H * W, constants["ROWS"]), past + T, B
    with torch.cuda.device_of(x):
        norm_kernel[grid](x, bias, gamma, before, y, H * W, past, **constants)
    return y.movedim(-1, 1)


def add(x: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """By add_kernel."""
    x, y, constants = _rows(x), _rows(y), options(x.shape[1])
    out, pixels = torch.empty_like(x), x.shape[:-1].numel()
    with torch.cuda.device_of(x):
        add_kernel[triton.cdiv(pixels, constants["ROWS"]),](x, bias, y, out, pixels, **constants)
    return out.movedim(-1, 1)


def enlarge(x: Tensor) -> Tensor:
    """By enlarge_kernel."""
    x, constants = _rows(x), options(x.shape[1])
    B, T, H, W, C = x.shape
    y = x.new_empty(B, T, 2 * H, 2 * W, C)
    with torch.cuda.device_of(x):
        enlarge_kernel[triton.cdiv(W, constants["ROWS"]) * B * T * H,](x, y, W, **constants)
    return y.movedim(-1, 1)


def _rows(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, T, H, W, C), contiguous; a copy only where channels are not last in memory."""
    return x.movedim(1, -1).contiguous()
