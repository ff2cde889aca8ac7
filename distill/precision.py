"""Mixed precision without autocast: a module computes in low precision, fp32 masters of its weights train."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from distill.replicas import rank
from distill.sharding import local, whole

AT_ONCE = 32  # gradients, about those of a block: more take memory, fewer time


def lower(module: nn.Module, dtype: torch.dtype, keep_fp32: Callable[[str], bool]) -> nn.Module:
    """The module itself with its parameters in dtype, but for those that keep_fp32 names."""
    for name, weight in module.named_parameters():
        if not keep_fp32(name):
            weight.data = weight.data.to(dtype)
    return module


def stored(module: nn.Module, keep_fp32: Callable[[str], bool]) -> dict[str, Tensor]:
    """What to ship on the CPU: parameters in bf16 but for those named, and buffers; nothing but on rank 0.

    Sharded parameters are gathered one by one, for which every rank must ask.
    """
    rounded = {name for name, _ in module.named_parameters() if not keep_fp32(name)}
    weights = {}
    for name, value in module.state_dict().items():
        gathered = whole(value)
        if rank() == 0:
            weights[name] = gathered.to("cpu", torch.bfloat16 if name in rounded else value.dtype)
    return weights


class Masters:
    """fp32 weights of the parameters of a module that train, by name; sharded ones are sharded alike.

    An optimiser moves them; `collect` brings them the gradients of a backward, `publish` rounds them into the
    module.  They, and gradients, moments and averages with them, are on `device`, None: the module's.  A
    parameter that is there in fp32 already is its own master.
    """

    def __init__(self, module: nn.Module, device: torch.device | None = None):
        self.module = module
        trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.weights = {name: _master(weight, device or weight.device) for name, weight in trained.items()}
        pairs = zip(trained.values(), self.weights.values(), strict=True)
        self.rounded = [(weight, master) for weight, master in pairs if weight is not master]
        for weight, master in self.rounded:
            weight.register_post_accumulate_grad_hook(partial(_add, master=master))

    def collect(self) -> None:
        """Move gradients to the masters, where those of several backwards add up in fp32.

        A step's first ones wait for this in bf16: activations lie beside them until the backward ends.  Later
        ones have a place in fp32, and went there as soon as they were made.
        """
        for start in range(0, len(self.rounded), AT_ONCE):
            _move(self.rounded[start : start + AT_ONCE])

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the module."""
        if self.rounded:
            weights, masters = zip(*self.rounded, strict=True)
            torch._foreach_copy_([local(w) for w in weights], [local(m) for m in masters])

    def tensors(self) -> dict[str, Tensor]:
        """The module's, by name, with fp32 masters in place of what they are masters of."""
        return self.module.state_dict() | self.weights


def _master(weight: nn.Parameter, device: torch.device) -> nn.Parameter:
    if (weight.dtype, weight.device) == (torch.float32, device):
        return weight
    return nn.Parameter(weight.detach().to(device, torch.float32))


def _add(weight: Tensor, *, master: Tensor) -> None:
    if master.grad is not None:
        _move([(weight, master)])


@torch.no_grad()
def _move(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Add gradients of weights, where they have any, to those of their masters."""
    pairs = [(weight, master) for weight, master in pairs if weight.grad is not None]
    if not pairs:
        return
    grads = [torch.empty_like(master) for _, master in pairs]
    torch._foreach_copy_([local(grad) for grad in grads], [local(weight.grad) for weight, _ in pairs])
    for (weight, master), grad in zip(pairs, grads, strict=True):
        weight.grad = None
        master.grad = grad if master.grad is None else master.grad.add_(grad)
