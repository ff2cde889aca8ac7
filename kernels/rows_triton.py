"""Rows of matrices in Triton, one at a time, whole in registers, read once and written once; and to int8.

A row is a tuple of tiles [CHUNK] side by side, so that widths of a few times a power of two, as Wan's are,
leave no thread idle.  What rows share is read again for each, as it stays in a multiprocessor's own cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference

TINY = tl.constexpr(reference.TINY)
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
def step_of(tiles):
    """The 127th of a row's largest number, NaN if any is."""
    largest = tl.abs(tiles[0])
    for i in tl.static_range(1, len(tiles)):
        largest = tl.maximum(largest, tl.abs(tiles[i]), propagate_nan=tl.PropagateNan.ALL)
    # compared as integers: of floats, this maximum may lose a NaN
    largest = tl.max(largest.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
    return tl.maximum(largest, TINY, propagate_nan=tl.PropagateNan.ALL) * (1 / 127)


@triton.jit
def store_counts(ptr, tiles, step, K: tl.constexpr, CHUNK: tl.constexpr):
    """A row in steps, rounded to int8."""
    inverse = tl.math.div_rn(1.0, step)
    for i in tl.static_range(len(tiles)):
        store_tile(ptr, (tiles[i] * inverse + MAGIC).to(tl.int32, bitcast=True), i, K, CHUNK)


@triton.jit(do_not_specialize=("M",))
def quantise_kernel(x_ptr, y_ptr, step_ptr, M, K: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr):
    """Rows of x (M, K) in steps of the 127th of their largest number."""
    first = tl.program_id(0) * SPAN
    for row in range(first, tl.minimum(first + SPAN, M)):
        place = tl.cast(row, tl.int64) * K
        x = load_row(x_ptr + place, K, CHUNK)
        step = step_of(x)
        tl.store(step_ptr + row, step)
        store_counts(y_ptr + place, x, step, K, CHUNK)


def quantise_options(K: int) -> dict[str, int | bool]:
    """The compile-time arguments and launch options of quantise_kernel."""
    # a product and a sum in one rounding would not be the twin's
    return options(K) | {"enable_fp_fusion": False}


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) -> int8 (M, K), steps (M,) fp32."""
    (M, K), x = x.shape, x.contiguous()
    y = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    step = torch.empty(M, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        quantise_kernel[(triton.cdiv(M, SPAN),)](x, y, step, M, **quantise_options(K))
    return y, step
