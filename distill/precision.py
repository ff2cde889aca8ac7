"""Mixed precision without autocast: a module computes in low precision, fp32 masters of its weights train."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn


def lower(module: nn.Module, dtype: torch.dtype, keep_fp32: Callable[[str], bool]) -> nn.Module:
    """The module itself with its parameters in dtype, but for those that keep_fp32 names."""
    for name, weight in module.named_parameters():
        if not keep_fp32(name):
            weight.data = weight.data.to(dtype)
    return module


def halved(module: nn.Module, keep_fp32: Callable[[str], bool]) -> nn.Module:
    """A bf16 copy to ship: every parameter but those named is rounded."""
    return lower(deepcopy(module), torch.bfloat16, keep_fp32)


class Masters:
    """fp32 weights of the parameters of a module that train, by name.

    An optimiser moves them; `collect` brings them the gradients of a backward, `publish` rounds them into the
    module.  A parameter that is fp32 already is its own master.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.weights = {name: _master(weight) for name, weight in trained.items()}
        pairs = zip(trained.values(), self.weights.values(), strict=True)
        self.rounded = [(weight, master) for weight, master in pairs if weight is not master]

    def collect(self) -> None:
        """Move gradients to the masters, where those of several backwards add up in fp32."""
        pairs = [(weight, master) for weight, master in self.rounded if weight.grad is not None]
        if not pairs:
            return
        grads = [torch.empty_like(master) for _, master in pairs]
        torch._foreach_copy_(grads, [weight.grad for weight, _ in pairs])
        for (weight, master), grad in zip(pairs, grads, strict=True):
            weight.grad = None
            master.grad = grad if master.grad is None else master.grad.add_(grad)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the module."""
        if self.rounded:
            torch._foreach_copy_(*map(list, zip(*self.rounded, strict=True)))

    def state_dict(self) -> dict[str, Tensor]:
        """The module's, with fp32 weights wherever there are masters."""
        return self.module.state_dict() | {name: weight.data for name, weight in self.weights.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave: masters exactly, the module rounded."""
        self.module.load_state_dict(state)
        for name, weight in self.weights.items():
            weight.copy_(state[name])


def _master(weight: nn.Parameter) -> nn.Parameter:
    return weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())
