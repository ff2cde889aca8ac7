"""How kernels are judged: by their error against fp64, and what PyTorch's own operators lose."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# forgiven in any case: in fp32 a GPU's exponentials take part, good to two roundings each
ROUNDINGS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 4}


def error(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def allowed(lost: Tensor, truth: Tensor, size: float | Tensor, dtype: torch.dtype) -> float:
    """Twice what PyTorch loses at this precision; where that is almost nothing, roundings of the result."""
    return max(2 * (lost.double() - truth).norm(), ROUNDINGS[dtype] * torch.finfo(dtype).eps * size)


def widen(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in tensors]


def differentiate(fn: Callable[..., Tensor], primals: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    primals = [x.detach().requires_grad_() for x in primals]
    return torch.autograd.grad(fn(*primals), primals, grad)
