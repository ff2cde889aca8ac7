"""What a causal video autoencoder does between its convolutions, each in one pass over memory.

In Triton on a GPU (kernels/pixels_triton.py), in fp32 and rounded once.  By kernels/reference_pixels.py on a
CPU, wherever gradients are recorded, and in graphs being compiled.

Shapes: x (B, C, T, H, W), channels last in memory, as are all results; a bias is (C,) or None.
"""

import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kernels import reference_pixels
from kernels.selftest import error_share, first_sound, is_unfused, poisoned

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# a trial's samples, frames, height and width: several programs to a frame, the last of them with less to do
TRIAL = (2, 2, 3, 37)
# of a trial's result, relative to all of it: several roundings to bf16; one wrong pixel is off by 1 / 21
ALLOWED = 0.01

Op = Callable[..., Tensor]
Form = tuple[tuple[int, ...], torch.dtype] | None


def fuses(x: Tensor) -> bool:
    """Whether kernels run there, so that a convolution may leave its bias to what follows it."""
    runs = (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and x.dtype in DTYPES
    # compilers come first, and fuse by themselves: they may not know of the rest
    return runs and not torch.compiler.is_compiling() and not torch.is_grad_enabled() and not is_unfused()


def norm_silu(x: Tensor, bias: Tensor | None, gamma: Tensor, before: Tensor) -> Tensor:
    """Frames before (B, C, n, H, W), then SiLU of gamma times x + bias with unit mean square at each pixel.

    gamma (C, 1, 1, 1).  (B, C, n + T, H, W): what a convolution that looks n frames back takes.
    """
    return _choose("norm_silu", x, bias, gamma, before)(x, bias, gamma, before)


def add(x: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """x + bias + y, y like x."""
    return _choose("add", x, bias, y)(x, bias, y)


def enlarge(x: Tensor) -> Tensor:
    """Every pixel twice in height and width: (B, C, T, 2H, 2W)."""
    return _choose("enlarge", x)(x)


def _choose(name: str, x: Tensor, *others: Tensor | None) -> Op:
    """The kernel, where it runs and is right, or the twin."""
    twin = getattr(reference_pixels, name)
    if not fuses(x):
        return twin
    # Triton, which only GPU machines have, is imported when it is first needed
    from kernels import pixels_triton

    fused = getattr(pixels_triton, name)
    return _sound(twin, fused, x.device, *map(_form, (x, *others))) if x.is_cuda else fused


def _form(x: Tensor | None) -> Form:
    """The shape of a small tensor in this one's place, and its dtype."""
    if x is None or x.ndim != 5:
        return None if x is None else (tuple(x.shape), x.dtype)
    B, T, H, W = (min(pair) for pair in zip(TRIAL, (x.shape[0], *x.shape[2:]), strict=True))
    return (B, x.shape[1], T, H, W), x.dtype


@cache
def _sound(twin: Op, fused: Op, device: torch.device, *forms: Form) -> Op:
    """What to run on that GPU for such tensors: the result is compared with the twin's in fp64."""

    def check(op: Op) -> float:
        generator = torch.Generator(device).manual_seed(0)
        drawn = [
            form and torch.randn(form[0], generator=generator, device=device).to(form[1]) for form in forms
        ]
        with torch.no_grad(), poisoned():
            got = op(*drawn)
        return error_share([got], [twin(*(None if x is None else x.double() for x in drawn))], ALLOWED)

    return first_sound(twin.__name__, {"Triton": fused, "PyTorch": twin}, check)
