"""Rows of matrices in Triton, one at a time, whole in registers, read once and written once; and to 8 bits.

A row is a tuple of tiles [CHUNK] side by side, so that widths of a few times a power of two, as Wan's are,
leave no thread idle.  What rows share is read again for each, as it stays in a multiprocessor's own cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference

TINY = tl.constexpr(reference.TINY)
E4M3_MAX = tl.constexpr(reference.E4M3_MAX)
# added to a number below 2^22, it leaves that, rounded to the nearest even, in the lowest bits
MAGIC = tl.constexpr(12582912.0)
# rows of a program, one after another: of more, there are too few programs to share out
SPAN = 4
# columns a warp holds: longer rows have 2, 4 or 8 warps
HELD = 2048


def options(K: int, numbers: int = 8) -> dict[str, int]:
    """The compile-time arguments and launch options of a kernel for rows of K.

    numbers: how many of a tile lie side by side in a thread.  8 are 16 bytes of a row in 16 bits.
    """
    warps = min(8, triton.next_power_of_2(triton.cdiv(K, HELD)))
    chunk = min(32 * warps * numbers, triton.next_power_of_2(K))
    return {"K": K, "CHUNK": chunk, "SPAN": SPAN, "num_warps": warps}


@triton.jit
def load_tile(ptr, i, K: tl.constexpr, CHUNK: tl.constexpr):
    """Tile i of a row, zeros beyond its end."""
    column = i * CHUNK + tl.arange(0, CHUNK)
    tile = tl.load(ptr + column) if K % CHUNK == 0 else tl.load(ptr + column, mask=column < K, other=0.0)
    return tile.to(tl.float32)  # [CHUNK]


@triton.jit
def load_row(ptr, K: tl.constexpr, CHUNK: tl.constexpr):
    """All tiles of a row."""
    tiles = ()
    for i in tl.static_range((K + CHUNK - 1) // CHUNK):
        tiles += (load_tile(ptr, i, K, CHUNK),)
    return tiles


@triton.jit
def store_tile(ptr, tile, i, K: tl.constexpr, CHUNK: tl.constexpr):
    """The opposite of load_tile, rounded to what ptr points to."""
    column = i * CHUNK + tl.arange(0, CHUNK)
    tl.store(ptr + column, tile.to(ptr.dtype.element_ty), mask=None if K % CHUNK == 0 else column < K)


@triton.jit
def _told_from_middles(y):
    """Numbers that round to the same e4m3 once they are cut to fp16, as Triton does on GPUs of 8.9.

    What is cut off leaves a 1 in the last place that is kept: a little beyond a middle is not the middle.
    """
    bits = y.to(tl.int32, bitcast=True)
    return (bits | ((bits & 0x1FFF) + 0x1FFF & 0x2000)).to(tl.float32, bitcast=True)


@triton.jit
def store_quantised(y_ptr, step_ptr, tiles, K: tl.constexpr, CHUNK: tl.constexpr):
    """A row in steps, which take its largest number to 127 of int8, or 448 of e4m3, to the nearest even.

    The step, and with it every number that the row stands for, is NaN if one of its numbers is not finite.
    """
    is_int8: tl.constexpr = y_ptr.dtype.element_ty == tl.int8
    largest = tl.abs(tiles[0])
    for i in tl.static_range(1, len(tiles)):
        largest = tl.maximum(largest, tl.abs(tiles[i]), propagate_nan=tl.PropagateNan.ALL)
    # compared as integers: of floats, this maximum may lose a NaN
    largest = tl.max(largest.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
    largest = tl.maximum(largest, TINY, propagate_nan=tl.PropagateNan.ALL)
    step = largest * (1 / (127 if is_int8 else E4M3_MAX))
    step += 0 * step  # NaN, not infinite: a count may be -1, whatever is not finite
    tl.store(step_ptr, step)
    inverse = tl.math.div_rn(1.0, step)
    for i in tl.static_range(len(tiles)):
        y = tiles[i] * inverse
        y = (y + MAGIC).to(tl.int32, bitcast=True) if is_int8 else _told_from_middles(y)
        store_tile(y_ptr, y, i, K, CHUNK)


@triton.jit(do_not_specialize=("M",))
def quantise_kernel(x_ptr, y_ptr, step_ptr, M, K: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr):
    """store_quantised of rows of x (M, K)."""
    first = tl.program_id(0) * SPAN
    for row in range(first, tl.minimum(first + SPAN, M)):
        place = tl.cast(row, tl.int64) * K
        store_quantised(y_ptr + place, step_ptr + row, load_row(x_ptr + place, K, CHUNK), K, CHUNK)


def quantise_options(K: int) -> dict[str, int | bool]:
    """The compile-time arguments and launch options of quantise_kernel."""
    # a product and a sum in one rounding would not be the twin's
    return options(K) | {"enable_fp_fusion": False}


def quantise_rows(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """x (..., K) -> int8 or e4m3 (..., K), steps (...) fp32."""
    x, K = x.contiguous(), x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    step = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    M = step.numel()
    with torch.cuda.device_of(x):
        quantise_kernel[(triton.cdiv(M, SPAN),)](x, y, step, M, **quantise_options(K))
    return y, step
