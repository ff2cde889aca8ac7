"""Triton kernels of kernels/norms.py, by rows as kernels/rows_triton.py has them."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from kernels import reference_norms
from kernels.rows_triton import SPAN, load_row, load_tile, options, store_quantised, store_tile

EPS = tl.constexpr(reference_norms.EPS)
# side by side in a thread, where rows end in 8 bits.  Left alone, the compiler has 16 to store, and a warp's
# loads of signals in fp32 take four times as many lines
COUNTS = 4


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


@triton.jit(do_not_specialize=("L",))
def modulate_kernel(
    x_ptr, shift_ptr, scale_ptr, step_ptr, y_ptr, L,
    K: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """LayerNorm of rows of x (B, L, K), times 1 + scale, plus shift, both (B, L if PER_TOKEN else 1, K).

    Rounded to y; or, if step_ptr is given, in steps (B, L), by store_quantised.
    """
    sample = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * SPAN
    for token in range(first, tl.minimum(first + SPAN, L)):
        row = sample * L + token
        place = (row if PER_TOKEN else sample) * K
        x = _centred(load_row(x_ptr + row * K, K, CHUNK), K, CHUNK)
        inverse = _inverse_rms(x, K)
        y = ()
        for i in tl.static_range(len(x)):
            scale = load_tile(scale_ptr + place, i, K, CHUNK)
            shift = load_tile(shift_ptr + place, i, K, CHUNK)
            y += (x[i] * inverse * (1 + scale) + shift,)
        if step_ptr is not None:
            store_quantised(y_ptr + row * K, step_ptr + row, y, K, CHUNK)
        else:
            for i in tl.static_range(len(y)):
                store_tile(y_ptr + row * K, y[i], i, K, CHUNK)


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
        x = load_row(x_ptr + row * K, K, CHUNK)
        inverse = _inverse_rms(x, K)
        table = tl.cast(token, tl.int64) * (D // 2)
        for i in tl.static_range(len(x)):
            # of tiles of whole heads, one has the angles of all
            if i == 0 or CHUNK % D != 0:
                pair = (i * (CHUNK // 2) + tl.arange(0, CHUNK // 2)) % (D // 2)
                cos = tl.load(cos_ptr + table + pair)
                sin = tl.load(sin_ptr + table + pair)
            y = x[i] * inverse * load_tile(weight_ptr, i, K, CHUNK)
            a, b = tl.split(tl.reshape(y, [CHUNK // 2, 2]))
            y = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [CHUNK])
            store_tile(y_ptr + row * K, y, i, K, CHUNK)


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
        x = load_row(x_ptr + row * K, K, CHUNK)
        y = load_row(y_ptr + row * K, K, CHUNK)
        for i in tl.static_range(len(x)):
            store_tile(out_ptr + row * K, x[i] + load_tile(gate_ptr + place, i, K, CHUNK) * y[i], i, K, CHUNK)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """By modulate_kernel."""
    return _modulate(x, shift, scale, x.dtype)[0]


def norm_modulate_int8(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """By modulate_kernel."""
    return _modulate(x, shift, scale, torch.int8)


def norm_modulate_fp8(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """By modulate_kernel."""
    return _modulate(x, shift, scale, torch.float8_e4m3fn)


def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By rotate_kernel."""
    D = 2 * cos.shape[-1]
    others = weight.contiguous(), cos.contiguous(), sin.contiguous()
    return _launch(rotate_kernel, x, x.dtype, *others, D=D).unflatten(-1, (-1, D))


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """By add_kernel."""
    others = y.contiguous(), _spread(gate, x)
    return _launch(add_kernel, x, x.dtype, *others, PER_TOKEN=gate.shape[1] != 1)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """In that dtype; and the steps, if it has 8 bits."""
    step = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) if dtype.itemsize == 1 else None
    others = _spread(shift, x), _spread(scale, x), step
    return _launch(modulate_kernel, x, dtype, *others, PER_TOKEN=scale.shape[1] != 1), step


def _spread(signal: Tensor, x: Tensor) -> Tensor:
    """(B or 1, L or 1, K) -> (B, L or 1, K)."""
    return signal.expand(x.shape[0], -1, -1).contiguous()


def _launch(
    kernel: JITFunction, x: Tensor, dtype: torch.dtype, *others: Tensor | None, **constants: int
) -> Tensor:
    """What a kernel makes of x (B, L, K) and whatever else."""
    (B, L, K), y = x.shape, torch.empty(x.shape, dtype=dtype, device=x.device)
    constants |= options(K, COUNTS) if dtype.itemsize == 1 else options(K)
    with torch.cuda.device_of(x):
        kernel[triton.cdiv(L, SPAN), B](x.contiguous(), *others, y, L, **constants)
    return y
