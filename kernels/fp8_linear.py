"""Linear layers in e4m3, for inference: one scale for each token and each output channel.

On a GPU that has them, Triton quantises (kernels/rows_triton.py) and PyTorch multiplies (torch._scaled_mm, by
rows); anywhere else plain twins do.
A number of e4m3 is off by up to a 16th of itself, whatever its row: outliers cost nothing, and nothing helps.
"""

import os
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.block_sparse_int8 import are_differentiated
from kernels.int8_linear import Tokens
from kernels.reference import E4M3_MAX, TINY
from kernels.selftest import error_share, first_sound, poisoned

E4M3 = torch.float8_e4m3fn
# of 2 million outputs, relative to all of them: a rounding to bf16, 2e-3, and sums of 14 bits, which Hopper
# keeps, 1e-3; one wrong tile of 128 x 128 is off by 8e-2
ALLOWED = 1e-2
# of a trial of quantisation, whose kernel has the twin's bits: several programs, the last of a row less; one
# wrong row is off by 1e-1
ROWS = 99
# rows and columns that torch._scaled_mm takes are multiples of it
MULTIPLE = 16

Quantise = Callable[[Tensor], tuple[Tensor, Tensor]]
Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., K) over steps, which take each row's largest number to 448 -> e4m3 (..., K), steps (...) fp32.

    For tokens, and for weights by output channel.  A NaN or an infinity makes a row's outputs NaN.
    """
    return _quantiser_of(x)(x)


def quantise_plainly(x: Tensor) -> tuple[Tensor, Tensor]:
    """The twin of quantise_rows: one IEEE operation after another, in fp32."""
    x = x.float()
    step = x.abs().amax(-1, keepdim=True).clamp(min=TINY) * (1 / E4M3_MAX)
    return (x * step.reciprocal()).to(E4M3), step.squeeze(-1)


def has_e4m3(device: torch.device) -> bool:
    """Whether Triton makes such numbers there."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 9)
    return os.environ.get("TRITON_INTERPRET") == "1"


def fp8_linear(
    x: Tensor | Tokens, weight: Tensor, weight_step: Tensor, bias: Tensor | None = None, *, gelu: bool = False
) -> Tensor:
    """F.linear of x (..., K), quantised by tokens, and a quantised weight (N, K) -> (..., N) in x's dtype.

    gelu: through tanh's GELU.  Raises ValueError for shapes or dtypes that do not fit, and where a derivative
    is asked for.
    """
    if isinstance(x, Tensor):
        if are_differentiated(x):
            raise ValueError("an 8-bit linear layer has no derivatives; call it under torch.no_grad()")
        x = Tokens(*quantise_rows(x), x.dtype)
    _check(x, weight, weight_step)
    tokens = x.counts.reshape(-1, x.counts.shape[-1]), x.steps.reshape(-1)
    y = _product_on(weight)(*tokens, weight, weight_step, bias).to(x.dtype)
    return (F.gelu(y, approximate="tanh") if gelu else y).view(*x.steps.shape, -1)


def twin(x: Tensor, x_step: Tensor, weight: Tensor, weight_step: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K) times weight (N, K), both e4m3, each in its rows' steps, plus bias (N,) -> (M, N) fp32."""
    y = x.float() @ weight.float().mT * x_step.unsqueeze(1) * weight_step
    return y if bias is None else y + bias.float()


def library(x: Tensor, x_step: Tensor, weight: Tensor, weight_step: Tensor, bias: Tensor | None) -> Tensor:
    """The same by PyTorch's kernel, which gives bf16."""
    return torch._scaled_mm(
        x,
        weight.mT,
        scale_a=x_step.unsqueeze(1),
        scale_b=weight_step.unsqueeze(0),
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _check(x: Tokens, weight: Tensor, weight_step: Tensor) -> None:
    """Raise ValueError unless tokens and weights fit each other."""
    dtypes = x.counts.dtype, weight.dtype, weight_step.dtype
    if dtypes != (E4M3, E4M3, torch.float32) or not x.dtype.is_floating_point:
        raise ValueError(
            f"got x, {x.dtype} in {x.counts.dtype}, weight and weight_step in {weight.dtype} and "
            f"{weight_step.dtype}; wanted floats in {E4M3}, {E4M3} and torch.float32"
        )
    shape = x.counts.shape
    if weight.ndim != 2 or shape[-1] != weight.shape[1] or weight_step.shape != weight.shape[:1]:
        raise ValueError(
            f"got x {tuple(shape)}, weight {tuple(weight.shape)} and weight_step "
            f"{tuple(weight_step.shape)}; wanted (..., K), (N, K) and (N,)"
        )


def _quantiser_of(x: Tensor) -> Quantise:
    """What quantises such rows."""
    if not has_e4m3(x.device):
        return quantise_plainly
    return _sound_quantiser(x.device, x.dtype, x.shape[-1]) if x.is_cuda else _quantise_in_triton


@cache
def _sound_quantiser(device: torch.device, dtype: torch.dtype, width: int) -> Quantise:
    """The kernel, if it is right there, or the twin."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(ROWS, width, generator=generator, device=device).to(dtype)
    counts, step = quantise_plainly(x)
    truth = counts.double(), step.double()

    def check(quantise: Quantise) -> float:
        with poisoned():
            return error_share(quantise(x), truth, ALLOWED)

    forms = {"Triton": _quantise_in_triton, "PyTorch": quantise_plainly}
    return first_sound("fp8 quantisation", forms, check)


def _quantise_in_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    # Triton, which only GPU machines have, is imported when it is first needed
    from kernels import rows_triton

    return rows_triton.quantise_rows(x, E4M3)


def _product_on(weight: Tensor) -> Product:
    """What multiplies there."""
    is_ragged = any(size % MULTIPLE for size in weight.shape)
    return _sound_product(weight.device) if weight.is_cuda and not is_ragged else twin


@cache
def _sound_product(device: torch.device) -> Product:
    """The library's, where the GPU has it and it is right, or the twin."""
    if not has_e4m3(device):
        return twin
    return first_sound("fp8 linear layer", {"PyTorch's": library, "the twin": twin}, Trial(device).share)


class Trial:
    """Products with ragged ends, of what a layer meets."""

    SIZES = (2200, 1040, 1040)

    def __init__(self, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)
        M, N, K = self.SIZES
        x, weight, bias = (
            torch.randn(size, generator=generator, device=device).bfloat16()
            for size in ((M, K), (N, K), (N,))
        )
        self.layer = *quantise_plainly(x), *quantise_plainly(weight), bias
        (x, x_step, weight, weight_step), bias = (t.double() for t in self.layer[:-1]), bias.double()
        self.truth = x @ weight.mT * x_step.unsqueeze(1) * weight_step + bias

    def share(self, form: Product) -> float:
        """Error of a product, as a share of what is allowed it."""
        with poisoned():
            y = form(*self.layer)
        return error_share((y,), (self.truth,), ALLOWED)
