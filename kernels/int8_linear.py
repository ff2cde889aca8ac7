"""Linear layers in 8 bits, for inference: one step for each token and each output channel, int8 products.

In Triton on a GPU (kernels/int8_linear_triton.py), by kernels/reference_int8.py on a CPU.  Steps are found
as numbers come, so that nothing needs calibration.
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
# of 2 million outputs, relative to all of them: one that is wrong is off by 7e-4.  What is right has the
# twin's bits, but that a GELU's last bit may tip the rounding to bf16, for one in ten thousand by 4e-3
ALLOWED = 1e-4


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) in steps of the 127th of each row's largest number -> int8 (M, K), steps (M,) fp32.

    For tokens, and for weights by output channel.  A NaN or an infinity makes a row's outputs NaN.
    """
    _check_dtype(x.dtype)
    if x.ndim != 2:
        raise ValueError(f"got numbers of shape {tuple(x.shape)} to quantise, wanted (rows, columns)")
    if not _runs_in_triton(x):
        return reference_int8.quantise_rows(x)
    from kernels import int8_linear_triton as kernels

    return kernels.quantise_rows(x)


def int8_product(
    x: Tensor,
    x_step: Tensor,
    weight: Tensor,
    weight_step: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    gelu: bool = False,
) -> Tensor:
    """(x x_step) (weight weight_step)^T + bias, through tanh's GELU if asked for.

    x (M, K) and weight (N, K) int8, steps (M,) and (N,) fp32 as from quantise_rows, bias (N,) -> (M, N) in
    dtype, rounded once.  Raises ValueError for shapes or dtypes that do not fit each other.
    """
    _check(x, x_step, weight, weight_step, bias, dtype)
    tensors = x, x_step, weight, weight_step, bias
    if not _runs_in_triton(x):
        return reference_int8.product(*tensors, gelu=gelu).to(dtype)
    from kernels import int8_linear_triton as kernels

    return kernels.product(*tensors, dtype=dtype, gelu=gelu, form=_form(x, weight, dtype, gelu))


def int8_linear(
    x: Tensor, weight: Tensor, weight_step: Tensor, bias: Tensor | None = None, *, gelu: bool = False
) -> Tensor:
    """F.linear of x (..., K), quantised by tokens, and a quantised weight (N, K) -> (..., N) in x's dtype.

    Raises ValueError for shapes or dtypes that do not fit, and where a derivative is asked for.
    """
    if are_differentiated(x):
        raise ValueError("an 8-bit linear layer has no derivatives; call it under torch.no_grad()")
    tokens = quantise_rows(x.reshape(-1, x.shape[-1]))
    y = int8_product(*tokens, weight, weight_step, bias, dtype=x.dtype, gelu=gelu)
    return y.view(*x.shape[:-1], -1)


def _check(
    x: Tensor, x_step: Tensor, weight: Tensor, weight_step: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> None:
    """Raise ValueError unless the arguments of int8_product fit each other."""
    _check_dtype(dtype)
    fits = x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[1]
    fits = fits and x_step.shape == x.shape[:1] and weight_step.shape == weight.shape[:1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = ", ".join(str(None if t is None else tuple(t.shape)) for t in (x_step, weight_step, bias))
        raise ValueError(
            f"got x {tuple(x.shape)}, weight {tuple(weight.shape)} and their steps and bias {shapes}; wanted "
            "(M, K), (N, K) and (M,), (N,), (N,)"
        )
    for name, tensor, wanted in (
        ("x", x, torch.int8),
        ("weight", weight, torch.int8),
        ("x_step", x_step, torch.float32),
        ("weight_step", weight_step, torch.float32),
    ):
        if tensor.dtype != wanted:
            raise ValueError(f"got {name} in {tensor.dtype}, wanted {wanted}")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"got {dtype} around an 8-bit linear layer, wanted one of {DTYPES}")


def _runs_in_triton(x: Tensor) -> bool:
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def _form(x: Tensor, weight: Tensor, dtype: torch.dtype, gelu: bool) -> NamedTuple:
    """How to run the kernel of products where x is."""
    from kernels import int8_linear_triton as kernels

    aligned = kernels.takes_descriptors(x, weight, dtype)
    if x.is_cuda:
        return _sound_form(x.device, dtype, gelu, aligned)
    return kernels.forms_for(0, aligned)[0]


@cache
def _sound_form(device: torch.device, dtype: torch.dtype, gelu: bool, aligned: bool) -> NamedTuple:
    """The first form that is right on that GPU."""
    from kernels import int8_linear_triton as kernels

    major, minor = torch.cuda.get_device_capability(device)
    trial = Trial(device, dtype, gelu)
    forms = {str(tuple(form)): form for form in kernels.forms_for(10 * major + minor, aligned)}
    return first_sound("8-bit linear layer", forms, trial.share)


class Trial:
    """Products of several tiles for each multiprocessor, with ragged ends along each axis."""

    SIZES = (2200, 1040, 1040)

    def __init__(self, device: torch.device, dtype: torch.dtype, gelu: bool):
        generator = torch.Generator(device).manual_seed(0)
        M, N, K = self.SIZES
        self.x, weight, self.bias = (
            torch.randn(size, generator=generator, device=device).to(dtype) for size in ((M, K), (N, K), (N,))
        )
        self.weight = reference_int8.quantise_rows(weight)
        self.gelu = gelu
        tokens = reference_int8.quantise_rows(self.x)
        self.truth = reference_int8.product(*tokens, *self.weight, self.bias, gelu=gelu).to(dtype)

    def share(self, form: NamedTuple) -> float:
        """Error of a form of the kernels, as a share of what is allowed it."""
        from kernels import int8_linear_triton as kernels

        with poisoned():
            tokens = kernels.quantise_rows(self.x)
            y = kernels.product(
                *tokens, *self.weight, self.bias, dtype=self.x.dtype, gelu=self.gelu, form=form
            )
        return error_share((y,), (self.truth.double(),), ALLOWED)
