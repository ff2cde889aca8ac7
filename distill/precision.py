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
        weights = {
            name: weight if self.keep_fp32(name) else weight.to(self.dtype)
            for name, weight in self.module.named_parameters()
        }
        return functional_call(self.module, weights, args)


def halved(module: nn.Module, keep_fp32: Callable[[str], bool]) -> nn.Module:
    """A bf16 copy to ship: every parameter but those named is rounded."""
    copied = deepcopy(module)
    for name, weight in copied.named_parameters():
        if not keep_fp32(name):
            weight.data = weight.data.bfloat16()
    return copied
