"""Mixed precision without autocast: fp32 weights train, a cast of them computes."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class Compute:
    """`module` computed in `dtype`; gradients arrive at the module's own fp32 parameters through the cast.

    keep_fp32 names the parameters that are not cast.
    """

    module: nn.Module
    dtype: torch.dtype
    keep_fp32: Callable[[str], bool]

    def __call__(self, *args: Tensor) -> Tensor:
        if self.dtype == torch.float32:
            return self.module(*args)
        weights = dict(self.module.named_parameters())
        cast = {name: weight for name, weight in weights.items() if not self.keep_fp32(name)}
        trained = {name: weight for name, weight in cast.items() if weight.requires_grad}
        frozen = {name: weight for name, weight in cast.items() if not weight.requires_grad}
        weights |= zip(trained, _Cast.apply(self.dtype, *trained.values()), strict=True)
        weights |= zip(frozen, _copies(tuple(frozen.values()), self.dtype), strict=True)
        return functional_call(self.module, weights, args)


class _Cast(torch.autograd.Function):
    """Many tensors to another dtype, and their gradients back: one launch each way, not one a tensor."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, dtype: torch.dtype, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        return _copies(weights, dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_copies(grads, torch.float32)


def _copies(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, tensors)
    return tuple(copies)


def halved(module: nn.Module, keep_fp32: Callable[[str], bool]) -> nn.Module:
    """A bf16 copy to ship: every parameter but those named is rounded."""
    copied = deepcopy(module)
    for name, weight in copied.named_parameters():
        if not keep_fp32(name):
            weight.data = weight.data.bfloat16()
    return copied
