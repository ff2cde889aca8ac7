"""Linear layers in 8 bits, for inference: one step for each token and each output channel, int8 products.

In Triton on a GPU (kernels/int8_linear_triton.py), by kernels/reference_int8.py on a CPU.  Steps are found
as numbers come, so that nothing needs calibration.

What leaves a GELU is rounded to 16 bits and quantised by a pass of its own, as a tile of a product sees a
part of its rows.  A step for each such part would save a feed-forward 3 bytes of each number, by arithmetic
12 % of its time at Wan's smallest sizes and 5 % at its largest; but it would have the next product convert
and add up all sums in fp32 for every part, a quarter of that one's time, and hold two sets of them.
"""

import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import reference_int8
from kernels.block_sparse_int8 import are_differentiated
from kernels.selftest import error_share, first_sound, poisoned

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# of 9 million outputs, relative to all of them: one that is wrong is off by 3e-4.  What is right has the
# twin's bits, but that a GELU's last bit may tip the rounding to bf16, for one in ten thousand by 4e-3
ALLOWED = 1e-4


class Tokens(NamedTuple):
    """Tokens in 8 bits, for all layers that read them: counts (..., K), int8 or e4m3, of steps (...) fp32.

    dtype: what they were, and what layers give.
    """

    counts: Tensor
    steps: Tensor
    dtype: torch.dtype


def quantise_tokens(x: Tensor) -> Tokens:
    """quantise_rows of x (..., K), the last axis a row."""
    counts, steps = quantise_rows(x.reshape(-1, x.shape[-1]))
    return Tokens(counts.view(x.shape), steps.view(x.shape[:-1]), x.dtype)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) in steps of the 127th of each row's largest number -> int8 (M, K), steps (M,) fp32.

    For tokens, and for weights by output channel.  A NaN or an infinity makes a row's outputs NaN.
    """
    _check_dtype(x.dtype)
    if x.ndim != 2:
        raise ValueError(f"got numbers of shape {tuple(x.shape)} to quantise, wanted (rows, columns)")
    if not _runs_in_triton(x):
        return reference_int8.quantise_rows(x)
    from kernels import rows_triton

    return rows_triton.quantise_rows(x)


def int8_product(
    x: Tokens,
    weight: Tensor,
    weight_step: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    add: Tensor | None = None,
    gate: Tensor | None = None,
    parts: int = 1,
) -> tuple[Tensor, ...]:
    """x (weight weight_step)^T + bias, through tanh's GELU if asked for; and add + gate times that.

    x (M, K); weight (parts N, K) int8, steps (parts N,) fp32 as from quantise_rows, bias (parts N,); add
    (M, N), gate (G, N), a row of which belongs to M / G rows -> (M, N) for each part, as many weights one
    under another, in x's dtype, rounded once.  Raises ValueError for shapes or dtypes that do not fit.
    """
    _check(x, weight, weight_step, bias, parts)
    _check_sum(x, weight, add, gate)
    tensors = x.counts, x.steps, weight, weight_step, bias, add, gate
    if not _runs_in_triton(weight):
        y = reference_int8.product(*tensors, gelu=gelu).to(x.dtype)
        return y.chunk(parts, 1)
    from kernels import int8_linear_triton as kernels

    gates = "no" if gate is None else "one" if len(gate) == 1 else "many"
    finish = kernels.Finish(gelu, add is not None, gates, parts)
    form = _form(x, weight, add, finish)
    return kernels.product(*tensors, dtype=x.dtype, finish=finish, form=form)


def int8_linear(
    x: Tensor | Tokens,
    weight: Tensor,
    weight_step: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    add: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """F.linear of x (B, ..., K), quantised by tokens, and a quantised weight (N, K) -> (B, ..., N).

    gelu: through tanh's GELU.  gate (B or 1, L or 1, N): times it, of x (B, L, K).  add (B, ..., N): plus it.
    Raises ValueError for shapes or dtypes that do not fit, and where a derivative is asked for.
    """
    tokens = _tokens(x, add, gate)
    if gate is not None:
        gate = (gate if gate.shape[:2] == (1, 1) else gate.expand(len(tokens.steps), -1, -1)).flatten(0, 1)
    add = None if add is None else add.flatten(0, -2)
    (y,) = int8_product(_rows(tokens), weight, weight_step, bias, gelu=gelu, add=add, gate=gate)
    return y.unflatten(0, tokens.steps.shape)


def int8_linears(
    x: Tensor | Tokens, weight: Tensor, weight_step: Tensor, bias: Tensor | None, parts: int
) -> tuple[Tensor, ...]:
    """int8_linear for so many weights of one size, one under another, by one product -> (..., N) of each."""
    tokens = _tokens(x)
    outputs = int8_product(_rows(tokens), weight, weight_step, bias, parts=parts)
    return tuple(y.unflatten(0, tokens.steps.shape) for y in outputs)


def _tokens(x: Tensor | Tokens, *others: Tensor | None) -> Tokens:
    """x in 8 bits; ValueError where a derivative of it, or of the others, is asked for."""
    floats = [t for t in (x, *others) if isinstance(t, Tensor)]
    if are_differentiated(*floats):
        raise ValueError("an 8-bit linear layer has no derivatives; call it under torch.no_grad()")
    return quantise_tokens(x) if isinstance(x, Tensor) else x


def _rows(x: Tokens) -> Tokens:
    return x._replace(counts=x.counts.flatten(0, -2), steps=x.steps.flatten())


def _check(x: Tokens, weight: Tensor, weight_step: Tensor, bias: Tensor | None, parts: int) -> None:
    """Raise ValueError unless tokens and weights of int8_product fit each other."""
    counts, steps, dtype = x
    _check_dtype(dtype)
    fits = counts.ndim == weight.ndim == 2 and counts.shape[1] == weight.shape[1]
    fits = fits and steps.shape == counts.shape[:1] and weight_step.shape == weight.shape[:1]
    if not fits or len(weight) % parts or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = ", ".join(str(None if t is None else tuple(t.shape)) for t in (steps, weight_step, bias))
        raise ValueError(
            f"got x {tuple(counts.shape)}, weight {tuple(weight.shape)} and their steps and bias {shapes}; "
            f"wanted (M, K), (N, K) and (M,), (N,), (N,), N a multiple of {parts}"
        )
    for name, tensor, wanted in (
        ("x", counts, torch.int8),
        ("weight", weight, torch.int8),
        ("x_step", steps, torch.float32),
        ("weight_step", weight_step, torch.float32),
    ):
        if tensor.dtype != wanted:
            raise ValueError(f"got {name} in {tensor.dtype}, wanted {wanted}")


def _check_sum(x: Tokens, weight: Tensor, add: Tensor | None, gate: Tensor | None) -> None:
    """Raise ValueError unless add and gate, where they are there, fit the outputs."""
    M, N = len(x.counts), len(weight)
    if gate is not None and (gate.shape[1:] != (N,) or M % len(gate)):
        raise ValueError(f"got gate {tuple(gate.shape)}, wanted (a divisor of {M}, {N})")
    if add is not None and (add.shape != (M, N) or add.dtype != x.dtype):
        raise ValueError(f"got add {tuple(add.shape)} in {add.dtype}, wanted ({M}, {N}) in {x.dtype}")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"got {dtype} around an 8-bit linear layer, wanted one of {DTYPES}")


def _runs_in_triton(x: Tensor) -> bool:
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def _form(x: Tokens, weight: Tensor, add: Tensor | None, finish: NamedTuple) -> NamedTuple:
    """How to run the kernel of products where x is."""
    from kernels import int8_linear_triton as kernels

    aligned = kernels.takes_descriptors(x.counts, weight, x.dtype, add, finish.parts)
    if weight.is_cuda:
        return _sound_form(weight.device, x.dtype, finish, aligned)
    return kernels.forms_for(0, aligned)[0]


@cache
def _sound_form(device: torch.device, dtype: torch.dtype, finish: NamedTuple, aligned: bool) -> NamedTuple:
    """The first form that is right on that GPU."""
    from kernels import int8_linear_triton as kernels

    major, minor = torch.cuda.get_device_capability(device)
    trial = Trial(device, dtype, finish)
    forms = {str(tuple(form)): form for form in kernels.forms_for(10 * major + minor, aligned)}
    return first_sound("8-bit linear layer", forms, trial.share)


class Trial:
    """Products of several tiles for each multiprocessor, with ragged ends along each axis.

    finish: of kernels/int8_linear_triton.py, what becomes of them.
    """

    SIZES = (8300, 1040, 1040)

    def __init__(self, device: torch.device, dtype: torch.dtype, finish: NamedTuple):
        generator = torch.Generator(device).manual_seed(0)
        M, N, K = self.SIZES
        columns = N * finish.parts
        sizes = ((M, K), (columns, K), (columns,), (M, N), (M // 2 if finish.gates == "many" else 1, N))
        drawn = (torch.randn(size, generator=generator, device=device) for size in sizes)
        self.x, weight, bias, add, gate = (t.to(dtype) for t in drawn)
        add, gate = add if finish.add else None, None if finish.gates == "no" else gate.float()
        self.layer = *reference_int8.quantise_rows(weight), bias, add, gate
        self.finish = finish
        y = reference_int8.product(*reference_int8.quantise_rows(self.x), *self.layer, gelu=finish.gelu)
        self.truth = [part.double() for part in y.to(dtype).chunk(finish.parts, 1)]

    def share(self, form: NamedTuple) -> float:
        """Error of a form of the kernels, as a share of what is allowed it."""
        from kernels import int8_linear_triton as kernels
        from kernels import rows_triton

        with poisoned():
            tokens = rows_triton.quantise_rows(self.x)
            y = kernels.product(*tokens, *self.layer, dtype=self.x.dtype, finish=self.finish, form=form)
        return error_share(y, self.truth, ALLOWED)
