"""Triton kernel of kernels/causal_conv.py: a matrix product for each tap, of tiles read where they lie.

A tile is so many rows and columns of one frame, moved by a tap's offset: descriptors read zeros outside the
frame.  Channels are handled in two powers of 2 side by side, so that Wan's widths leave nothing idle.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

TAPS = tl.constexpr(27)
# channels out of a program: with more, what it sums would not stay in registers
WIDEST = 192


class Form(NamedTuple):
    """A tile's rows and columns of a frame, warps, and stages of the load pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


# of up to 96 channels out, and of more
NARROW, WIDE = Form(16, 16, 8, 3), Form(8, 16, 8, 4)


def parts(channels: int, most: int) -> tuple[int, int]:
    """Two powers of 2, of which the second may be 0: their sum, at most so much, divides a multiple of 32."""
    sums = [(a, b) for a in (32, 64, 128) for b in (0, 32, 64) if b < a and a + b <= most]
    return max((pair for pair in sums if channels % sum(pair) == 0), key=sum)


def options(C: int, N: int, form: Form | None = None) -> dict[str, int]:
    """The compile-time arguments and launch options for weights (N, C, 3, 3, 3)."""
    n0, n1 = parts(N, WIDEST)
    k0, k1 = parts(C, 96)
    form = form or (NARROW if n0 + n1 <= 96 else WIDE)
    tile = {"ROWS": form.rows, "COLUMNS": form.columns, "K0": k0, "K1": k1, "N0": n0, "N1": n1}
    return {"C": C, **tile, "num_warps": form.warps, "num_stages": form.stages}


@triton.jit(do_not_specialize=("frames",))
def conv_kernel(
    x0, x1, w00, w01, w10, w11, y0, y1, frames, across,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
):  # fmt: skip
    """Descriptors: x (B (frames + 2), H, W, C), w (N, 27 C) and y (B frames, H, W, N).

    x by [1, ROWS, COLUMNS, K0 and K1], w by [N0 and N1, K0 and K1], y by [1, ROWS, COLUMNS, N0 and N1].  A
    program of the grid (N / (N0 + N1), ., B frames) has one tile of a frame, `across` of them side by side.
    """
    n = tl.program_id(0) * (N0 + N1)
    column, line = tl.program_id(1) % across * COLUMNS, tl.program_id(1) // across * ROWS
    frame = tl.program_id(2)
    # two frames before each sample's
    first = frame + frame // frames * 2
    steps: tl.constexpr = C // (K0 + K1)
    sums0 = tl.zeros([ROWS * COLUMNS, N0], tl.float32)
    sums1 = tl.zeros([ROWS * COLUMNS, N1 if N1 else 16], tl.float32)
    for i in range(TAPS * steps):
        tap, k = i // steps, i % steps * (K0 + K1)
        t, h, w = first + tap // 9, line + tap // 3 % 3 - 1, column + tap % 3 - 1
        depth = tap * C + k
        a = x0.load([t, h, w, k]).reshape([ROWS * COLUMNS, K0])
        sums0 = tl.dot(a, w00.load([n, depth]).T, sums0)
        if N1:
            sums1 = tl.dot(a, w10.load([n + N0, depth]).T, sums1)
        if K1:
            a = x1.load([t, h, w, k + K0]).reshape([ROWS * COLUMNS, K1])
            sums0 = tl.dot(a, w01.load([n, depth + K0]).T, sums0)
            if N1:
                sums1 = tl.dot(a, w11.load([n + N0, depth + K0]).T, sums1)
    y0.store([frame, line, column, n], sums0.to(y0.dtype).reshape([1, ROWS, COLUMNS, N0]))
    if N1:
        y1.store([frame, line, column, n + N0], sums1.to(y1.dtype).reshape([1, ROWS, COLUMNS, N1]))


def causal_conv(x: Tensor, weight: Tensor, form: Form | None = None) -> Tensor:
    """By conv_kernel."""
    N, C = weight.shape[:2]
    # no copies, if channels are last in memory
    x, weight = x.movedim(1, -1).contiguous(), weight.movedim(1, -1).contiguous().flatten(1)
    (B, T, H, W, _), constants = x.shape, options(C, N, form)
    y = x.new_empty(B, T - 2, H, W, N)
    tile = constants["ROWS"], constants["COLUMNS"]
    depths, widths = ((constants[f"{name}0"], constants[f"{name}1"]) for name in "KN")
    blocks = [(x.flatten(0, 1), [1, *tile, k]) for k in depths]
    blocks += [(weight, [n, k]) for n in widths for k in depths]
    blocks += [(y.flatten(0, 1), [1, *tile, n]) for n in widths]
    descs = [TensorDescriptor.from_tensor(t, block) if all(block) else None for t, block in blocks]
    down, across = (triton.cdiv(size, side) for size, side in zip((H, W), tile, strict=True))
    grid = N // sum(widths), across * down, B * (T - 2)
    with torch.cuda.device_of(x):
        conv_kernel[grid](*descs, T - 2, across, **constants)
    return y.movedim(-1, 1)
