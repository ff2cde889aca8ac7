"""Norms of a transformer's tokens with the element-wise steps beside them, each in one pass over memory.

In Triton on a GPU (kernels/norms_triton.py), in fp32 and rounded once.  By kernels/reference_norms.py on a
CPU, where a gradient or a tangent is asked for, and in graphs being compiled, which fuse it by themselves.

Shapes: B batch, L tokens, E width, N heads of D channels.  Signals of time - shift, scale, gate - are
(B or 1, L or 1, E): one for a sample, or one for each of its tokens.
"""

import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kernels import reference_norms
from kernels.block_sparse_int8 import are_differentiated
from kernels.fp8_linear import has_e4m3
from kernels.selftest import error_share, first_sound, is_unfused, poisoned

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# of samples, and of tokens: several programs, the last of a row less
TRIAL = 33
# of a trial's outputs, relative to all of them: a few roundings to bf16; one wrong token is off by 1 / TRIAL
ALLOWED = 0.016

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, without weights.  x (B, L, E), signals -> like x."""
    _check_signals(x, shift, scale)
    return _choose(reference_norms.norm_modulate, x, shift, scale)(x, shift, scale)


def norm_modulate_int8(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """norm_modulate, quantised before it is rounded: as by quantise_rows, to int8 (B, L, E) and steps (B, L).

    Raises ValueError where a derivative is asked for.
    """
    return _quantised(reference_norms.norm_modulate_int8, x, shift, scale)


def norm_modulate_fp8(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same to e4m3, as by quantise_rows of kernels/fp8_linear.py."""
    return _quantised(reference_norms.norm_modulate_fp8, x, shift, scale, runs=has_e4m3(x.device))


def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm over the whole width, times a weight, then rotation of channel pairs (2j, 2j + 1) of each head.

    x (B, L, E), weight (E,), table (L, 1, D / 2) of cosines and of sines -> (B, L, N, D) in x's dtype.
    """
    tensors = x, weight, cos, sin
    (L, E), half = x.shape[1:], cos.shape[-1]
    if [t.shape for t in tensors[1:]] != [(E,), (L, 1, half), (L, 1, half)] or E % (2 * half):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"got {shapes}, wanted (B, L, E), (E,), (L, 1, D / 2) twice, and D to divide E")
    return _choose(reference_norms.norm_rotate, *tensors)(*tensors)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y.  x, y (B, L, E), signal -> like x."""
    _check_signals(x, gate)
    if y.shape != x.shape:
        raise ValueError(f"got y {tuple(y.shape)}, wanted x's {tuple(x.shape)}")
    return _choose(reference_norms.add_gated, x, y, gate)(x, y, gate)


def _quantised(
    twin: Op, x: Tensor, shift: Tensor, scale: Tensor, *, runs: bool = True
) -> tuple[Tensor, Tensor]:
    """The twin's numbers and steps; runs: whether its kernel does there."""
    _check_signals(x, shift, scale)
    if are_differentiated(x, shift, scale):
        raise ValueError("8-bit numbers have no derivatives; call it under torch.no_grad()")
    return (_choose(twin, x, shift, scale) if runs else twin)(x, shift, scale)


def _check_signals(x: Tensor, *signals: Tensor) -> None:
    """Raise ValueError unless these are signals for x, of one shape."""
    B, L, E = x.shape
    wanted = [(b, tokens, E) for b in (1, B) for tokens in (1, L)]
    if signals[0].shape not in wanted or any(signal.shape != signals[0].shape for signal in signals):
        shapes = ", ".join(str(tuple(signal.shape)) for signal in signals)
        raise ValueError(f"got x {tuple(x.shape)} and {shapes}, wanted alike ({B} or 1, {L} or 1, {E})")


def _choose(twin: Op, x: Tensor, *others: Tensor) -> Op:
    """The kernel of the twin's name, where it runs and is right, or the twin."""
    runs = (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and x.dtype in DTYPES
    if not runs or torch.compiler.is_compiling() or is_unfused() or are_differentiated(x, *others):
        return twin
    # Triton, which only GPU machines have, is imported when it is first needed
    from kernels import norms_triton

    fused = getattr(norms_triton, twin.__name__)
    forms = (((*(min(n, TRIAL) for n in t.shape[:-1]), t.shape[-1]), t.dtype) for t in (x, *others))
    return _sound(twin, fused, x.device, *forms) if x.is_cuda else fused


@cache
def _sound(twin: Op, fused: Op, device: torch.device, *forms: tuple[tuple[int, ...], torch.dtype]) -> Op:
    """What to run on that GPU for such tensors: outputs are compared with the twin's in fp64."""

    def check(op: Op) -> float:
        generator = torch.Generator(device).manual_seed(0)
        drawn = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape, dtype in forms]
        with poisoned():
            got = values(op(*drawn))
        return error_share(got, values(twin(*(x.double() for x in drawn))), ALLOWED)

    return first_sound(twin.__name__, {"Triton": fused, "PyTorch": twin}, check)


def values(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs, or the numbers that those of 8 bits and their steps stand for."""
    if isinstance(outputs, Tensor):
        return (outputs,)
    first, second = outputs
    return (first.double() * second.unsqueeze(-1),) if first.dtype.itemsize == 1 else outputs
