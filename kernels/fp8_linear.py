"""Linear layers in e4m3, for inference: one scale for each token and each output channel.

On a GPU that has them, PyTorch multiplies (torch._scaled_mm, by rows); anywhere else a plain twin does.
A number of e4m3 is off by up to a 16th of itself, whatever its row: outliers cost nothing, and nothing helps.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.block_sparse_int8 import are_differentiated
from kernels.reference import E4M3_MAX, TINY
from kernels.selftest import error_share, first_sound, poisoned

E4M3 = torch.float8_e4m3fn
# of 2 million outputs, relative to all of them: a rounding to bf16, 2e-3, and sums of 14 bits, which Hopper
# keeps, 1e-3; one wrong tile of 128 x 128 is off by 8e-2
ALLOWED = 1e-2
# rows and columns that torch._scaled_mm takes are multiples of it
MULTIPLE = 16

Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) over steps, which take each row's largest number to 448 -> e4m3 (M, K), steps (M,) fp32.

    For tokens, and for weights by output channel.  A NaN or an infinity makes a row's outputs NaN.
    """
    # reads x once and makes nothing of its size
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, dtype=torch.float32)
    step = largest.clamp(min=TINY) * (1 / E4M3_MAX)
    return (x * step.reciprocal().unsqueeze(-1)).to(E4M3), step


def fp8_linear(
    x: Tensor, weight: Tensor, weight_step: Tensor, bias: Tensor | None = None, *, gelu: bool = False
) -> Tensor:
    """F.linear of x (..., K), quantised by tokens, and a quantised weight (N, K) -> (..., N) in x's dtype.

    gelu: through tanh's GELU.  Raises ValueError for shapes or dtypes that do not fit, and where a derivative
    is asked for.
    """
    if are_differentiated(x):
        raise ValueError("an 8-bit linear layer has no derivatives; call it under torch.no_grad()")
    if weight.dtype != E4M3 or weight_step.dtype != torch.float32 or not x.dtype.is_floating_point:
        raise ValueError(
            f"got x, weight and weight_step in {x.dtype}, {weight.dtype} and {weight_step.dtype}; wanted "
            f"floats, {E4M3} and torch.float32"
        )
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1] or weight_step.shape != weight.shape[:1]:
        raise ValueError(
            f"got x {tuple(x.shape)}, weight {tuple(weight.shape)} and weight_step "
            f"{tuple(weight_step.shape)}; wanted (..., K), (N, K) and (N,)"
        )
    tokens = quantise_rows(x.reshape(-1, x.shape[-1]))
    y = _product_on(x.device, weight)(*tokens, weight, weight_step, bias).to(x.dtype)
    return (F.gelu(y, approximate="tanh") if gelu else y).view(*x.shape[:-1], -1)


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


def _product_on(device: torch.device, weight: Tensor) -> Product:
    """What multiplies there."""
    if device.type != "cuda" or any(size % MULTIPLE for size in weight.shape):
        return twin
    return _sound_product(device)


@cache
def _sound_product(device: torch.device) -> Product:
    """The library's, where the GPU has it and it is right, or the twin."""
    forms = {"PyTorch's": library, "the twin": twin}
    if torch.cuda.get_device_capability(device) < (8, 9):
        return twin
    return first_sound("fp8 linear layer", forms, Trial(device).share)


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
        self.layer = *quantise_rows(x), *quantise_rows(weight), bias
        (x, x_step, weight, weight_step), bias = (t.double() for t in self.layer[:-1]), bias.double()
        self.truth = x @ weight.mT * x_step.unsqueeze(1) * weight_step + bias

    def share(self, form: Product) -> float:
        """Error of a product, as a share of what is allowed it."""
        with poisoned():
            y = form(*self.layer)
        return error_share((y,), (self.truth,), ALLOWED)
