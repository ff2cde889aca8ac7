"""Triton kernels of kernels/norms.py: one row at a time, whole in registers, read once and written once.

A row is a tuple of tiles [CHUNK] side by side, so that widths of a few times a power of two, as Wan's are,
leave no thread idle.  What rows share is read again for each, as it stays in a multiprocessor's own cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from kernels import reference_norms
from kernels.int8_linear_triton import MAGIC, TINY

EPS = tl.constexpr(reference_norms.EPS)
# rows of a program, one after another: of more, there are too few programs to share out
SPAN = 4
# columns a warp holds: longer rows have 2, 4 or 8 warps
HELD = 2048
# columns of a tile: most, and fewest of one that only divides the width
LARGEST, SMALLEST = 1024, 256


def options(K: int) -> dict[str, int]:
    """The compile-time arguments and launch options of every kernel, for rows of K."""
    divisor = min(LARGEST, K & -K)
    chunk = divisor if divisor >= SMALLEST else min(LARGEST, triton.next_power_of_2(K))
    warps = min(8, triton.next_power_of_2(triton.cdiv(K, HELD)))
    return {"K": K, "CHUNK": chunk, "SPAN": SPAN, "num_warps": warps}


@triton.jit
def _load(ptr, i, K: tl.constexpr, CHUNK: tl.constexpr):
    """Tile i of a row, zeros beyond its end."""
    column = i * CHUNK + tl.arange(0, CHUNK)
    tile = tl.load(ptr + column) if K % CHUNK == 0 else tl.load(ptr + column, mask=column < K, other=0.0)
    return tile.to(tl.float32)  # [CHUNK]


@triton.jit
def _load_row(ptr, K: tl.constexpr, CHUNK: tl.constexpr):
    tiles = ()
    for i in tl.static_range((K + CHUNK - 1) // CHUNK):
        tiles += (_load(ptr, i, K, CHUNK),)
    return tiles


@triton.jit
def _store(ptr, tile, i, K: tl.constexpr, CHUNK: tl.constexpr):
    """The opposite of _load, rounded to what ptr points to."""
    column = i * CHUNK + tl.arange(0, CHUNK)
    tl.store(ptr + column, tile.to(ptr.dtype.element_ty), mask=None if K % CHUNK == 0 else column < K)


@triton.jit
def _inverse_rms(tiles, K: tl.constexpr):
    total = tiles[0] * tiles[0]
    for i in tl.static_range(1, len(tiles)):
        total += tiles[i] * tiles[i]
    return tl.rsqrt(tl.sum(total, 0) / K + EPS)


@triton.jit
def _centred(tiles, K: tl.constexpr, CHUNK: tl.constexpr):
    """Tiles less the row's mean; zeros beyond its end."""
    total = tiles[0]
    for i in tl.static_range(1, len(tiles)):
        total += tiles[i]
    mean = tl.sum(total, 0) / K
    centred = ()
    for i in tl.static_range(len(tiles)):
        tile = tiles[i] - mean
        if K % CHUNK != 0:
            tile = tl.where(i * CHUNK + tl.arange(0, CHUNK) < K, tile, 0.0)
        centred += (tile,)
    return centred


@triton.jit
def _step(tiles):
    """The 127th of a row's largest number, NaN if any is, as in quantise_kernel."""
    largest = tl.abs(tiles[0])
    for i in tl.static_range(1, len(tiles)):
        largest = tl.maximum(largest, tl.abs(tiles[i]), propagate_nan=tl.PropagateNan.ALL)
    # compared as integers: of floats, this maximum may lose a NaN
    largest = tl.max(largest.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
    return tl.maximum(largest, TINY, propagate_nan=tl.PropagateNan.ALL) * (1 / 127)


@triton.jit(do_not_specialize=("L",))
def modulate_kernel(
    x_ptr, shift_ptr, scale_ptr, step_ptr, y_ptr, L,
    K: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """LayerNorm of rows of x (B, L, K), times 1 + scale, plus shift, both (B, L if PER_TOKEN else 1, K).

    Rounded to y; or, if step_ptr is given, in steps (B, L).
    """
    sample = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * SPAN
    for token in range(first, tl.minimum(first + SPAN, L)):
        row = sample * L + token
        place = (row if PER_TOKEN else sample) * K
        x = _centred(_load_row(x_ptr + row * K, K, CHUNK), K, CHUNK)
        inverse = _inverse_rms(x, K)
        y = ()
        for i in tl.static_range(len(x)):
            scale = _load(scale_ptr + place, i, K, CHUNK)
            shift = _load(shift_ptr + place, i, K, CHUNK)
            y += (x[i] * inverse * (1 + scale) + shift,)
        if step_ptr is not None:
            step = _step(y)
            tl.store(step_ptr + row, step)
            inverse = tl.math.div_rn(1.0, step)
        for i in tl.static_range(len(y)):
            out = y[i] if step_ptr is None else (y[i] * inverse + MAGIC).to(tl.int32, bitcast=True)
            _store(y_ptr + row * K, out, i, K, CHUNK)


@triton.jit(do_not_specialize=("L",))
def rotate_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, y_ptr, L,
    K: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """RMSNorm of rows of x (B, L, K), then turned by the table (L, D / 2), every D columns alike."""
    sample = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * SPAN
    for token in range(first, tl.minimum(first + SPAN, L)):
        row = sample * L + token
        x = _load_row(x_ptr + row * K, K, CHUNK)
        inverse = _inverse_rms(x, K)
        table = tl.cast(token, tl.int64) * (D // 2)
        for i in tl.static_range(len(x)):
            # of tiles of whole heads, one has the angles of all
            if i == 0 or CHUNK % D != 0:
                pair = (i * (CHUNK // 2) + tl.arange(0, CHUNK // 2)) % (D // 2)
                cos = tl.load(cos_ptr + table + pair)
                sin = tl.load(sin_ptr + table + pair)
            y = x[i] * inverse * _load(weight_ptr, i, K, CHUNK)
            a, b = tl.split(tl.reshape(y, [CHUNK // 2, 2]))
            y = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [CHUNK])
            _store(y_ptr + row * K, y, i, K, CHUNK)


@triton.jit(do_not_specialize=("L",))
def add_kernel(
    x_ptr, y_ptr, gate_ptr, out_ptr, L,
    K: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """x + gate y, of rows of x and y (B, L, K) and gate (B, L if PER_TOKEN else 1, K)."""
    sample = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * SPAN
    for token in range(first, tl.minimum(first + SPAN, L)):
        row = sample * L + token
        place = (row if PER_TOKEN else sample) * K
        x = _load_row(x_ptr + row * K, K, CHUNK)
        y = _load_row(y_ptr + row * K, K, CHUNK)
        for i in tl.static_range(len(x)):
            _store(out_ptr + row * K, x[i] + _load(gate_ptr + place, i, K, CHUNK) * y[i], i, K, CHUNK)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """By modulate_kernel."""
    return _modulate(x, shift, scale, x.dtype, None)


def norm_modulate_int8(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """By modulate_kernel."""
    step = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    return _modulate(x, shift, scale, torch.int8, step), step


def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By rotate_kernel."""
    D = 2 * cos.shape[-1]
    others = weight.contiguous(), cos.contiguous(), sin.contiguous()
    return _launch(rotate_kernel, x, x.dtype, *others, D=D).unflatten(-1, (-1, D))


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """By add_kernel."""
    others = y.contiguous(), _spread(gate, x)
    return _launch(add_kernel, x, x.dtype, *others, PER_TOKEN=gate.shape[1] != 1)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype, step: Tensor | None) -> Tensor:
    others = _spread(shift, x), _spread(scale, x), step
    return _launch(modulate_kernel, x, dtype, *others, PER_TOKEN=scale.shape[1] != 1)


def _spread(signal: Tensor, x: Tensor) -> Tensor:
    """(B or 1, L or 1, K) -> (B, L or 1, K)."""
    return signal.expand(x.shape[0], -1, -1).contiguous()


def _launch(
    kernel: JITFunction, x: Tensor, dtype: torch.dtype, *others: Tensor | None, **constants: int
) -> Tensor:
    """What a kernel makes of x (B, L, K) and whatever else."""
    (B, L, K), y = x.shape, torch.empty(x.shape, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        kernel[triton.cdiv(L, SPAN), B](x.contiguous(), *others, y, L, **options(K), **constants)
    return y
