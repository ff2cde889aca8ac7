"""Convolutions of 3x3x3 that look back in time: in Triton on a Hopper GPU where that is faster than cuDNN.

Which is faster depends on the sizes and on cuDNN, and is timed when a size is first met.
"""

import os
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.pixels import fuses
from kernels.selftest import error_share, first_sound, poisoned

DTYPES = (torch.bfloat16, torch.float16)
# channels in and out divide by it
STEP = 32
# frames, height and width of a trial: several tiles to a frame, the last of a row and of a column smaller
TRIAL = (4, 19, 37)
# of a trial's result, relative to all of it: a rounding to bf16; one wrong pixel is off by 1 / 37
ALLOWED = 0.01
# of the other's time, what the kernel must stay below: a draw always ends the same way
MARGIN = 0.97
REPEATS = 3

Op = Callable[[Tensor, Tensor], Tensor]
_faster: dict[tuple[object, ...], Op] = {}


def causal_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Frames and the two before (B, C, 2 + T, H, W), zeros around them; (N, C, 3, 3, 3) -> (B, N, T, H, W).

    Channels last in memory, there and here; without a gradient wherever `pixels.fuses`.
    """
    return _choose(x, weight)(x, weight)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    """By PyTorch."""
    return F.conv3d(x, weight, padding=(0, 1, 1))


def _choose(x: Tensor, weight: Tensor) -> Op:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    fits = x.dtype in DTYPES and not any(n % STEP for n in weight.shape[:2])
    runs = interpreted or (x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9)
    if not (fits and runs and fuses(x)):
        return plain
    if interpreted:
        from kernels import causal_conv_triton

        return causal_conv_triton.causal_conv
    size = (x.device, x.dtype, x.shape[0], *x.shape[-2:], *weight.shape)
    if size not in _faster:
        sound = _sound(x.device, x.dtype, *weight.shape[:2])
        _faster[size] = sound if sound is plain else faster({sound: MARGIN, plain: 1}, x, weight)
    return _faster[size]


def faster(rivals: dict[Op, float], x: Tensor, weight: Tensor) -> Op:
    """The quickest, timed in turns after one of warm-up, each over its share of the time."""
    spent = {op: [] for op in rivals}
    for turn in range(REPEATS + 1):
        for op, times in spent.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            op(x, weight)
            end.record()
            end.synchronize()
            if turn:
                times.append(start.elapsed_time(end))
    return min(rivals, key=lambda op: min(spent[op]) / rivals[op])


@cache
def _sound(device: torch.device, dtype: torch.dtype, N: int, C: int) -> Op:
    """What to run on that GPU for such channels: the result is compared with that in fp64."""
    # Triton, which only GPU machines have, is imported when it is first needed
    from kernels import causal_conv_triton

    def check(op: Op) -> float:
        draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
        x = draw(1, TRIAL[0], *TRIAL[1:], C).to(dtype).movedim(-1, 1)
        weight = draw(N, C, 3, 3, 3).to(dtype)
        with torch.no_grad(), poisoned():
            got = op(x, weight)
        return error_share([got], [plain(x.double(), weight.double())], ALLOWED)

    forms = {"Triton": causal_conv_triton.causal_conv, "PyTorch": plain}
    return first_sound("causal_conv", forms, check)
