"""AdamW without momentum."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from distill.sharding import local


class AdamWithoutMomentum(torch.optim.Optimizer):
    """torch.optim.AdamW of beta1 = 0, to the bit: its first moment is the gradient, and is not stored.

    By one kernel, without temporaries.
    """

    def __init__(self, groups: Iterable[dict[str, object]], *, lr: float, beta2: float):
        super().__init__(groups, {"lr": lr, "beta2": beta2})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            states = [self._state(weight) for weight in weights]
            grads = [local(weight.grad) for weight in weights]
            adamw(
                [local(weight) for weight in weights],
                grads,
                grads,  # in place of first moments, which become 0 * themselves + 1 * gradient
                [local(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                maximize=False,
                lr=group["lr"],
                beta1=0.0,
                beta2=group["beta2"],
                weight_decay=group["weight_decay"],
                eps=1e-8,
            )

    def _state(self, weight: Tensor) -> dict[str, Tensor]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        return state
