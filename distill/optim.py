"""AdamW, or Muon for matrices, and a learning rate that follows progress rather than steps."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.adam import AdamWithoutMomentum
from distill.muon import Muon


@dataclass(frozen=True)
class Optim:
    """One role's optimiser.  Weight decay spares vectors, which are biases and the scales of norms."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 300  # steps
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    matrices: Literal["adamw", "muon"] = "adamw"  # what moves weights of two axes

    def build(self, parameters: Iterable[Tensor]) -> "torch.optim.Optimizer | Several":
        """The optimiser of the parameters that require gradients."""
        trained = [p for p in parameters if p.requires_grad]
        if self.matrices == "adamw":
            return self._adamw(trained)
        matrices = [p for p in trained if p.ndim == 2]
        muon = Muon(matrices, lr=self.lr, weight_decay=self.weight_decay)
        return Several(muon, self._adamw([p for p in trained if p.ndim != 2]))

    def _adamw(self, trained: list[Tensor]) -> torch.optim.Optimizer:
        # a convolution's norm keeps its vector as (C, 1, 1, 1)
        is_vector = [sum(size > 1 for size in p.shape) <= 1 for p in trained]
        vectors = [p for p, yes in zip(trained, is_vector, strict=True) if yes]
        others = [p for p, yes in zip(trained, is_vector, strict=True) if not yes]
        groups = [
            {"params": others, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        if self.betas[0] == 0:
            return AdamWithoutMomentum(groups, lr=self.lr, beta2=self.betas[1])
        return torch.optim.AdamW(groups, lr=self.lr, betas=tuple(self.betas), fused=True)

    def rate(self, step: int, progress: float) -> float:
        """Learning rate at a step (from 0) and a share of the run done (0 to 1); it ends at 0."""
        if self.decay == "cosine":
            remaining = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))
        else:
            remaining = 1.0 - min(progress, 1.0) if self.decay == "linear" else 1.0
        return self.lr * min(1.0, (step + 1) / self.warmup) * remaining


class Several:
    """Optimisers of different weights that act as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, object]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        return {weight: state for optimizer in self.optimizers for weight, state in optimizer.state.items()}

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, *, set_to_none: bool) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)
