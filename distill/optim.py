"""AdamW, and a learning rate that follows progress rather than steps."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Optim:
    """One role's optimiser.  Weight decay spares vectors, which are biases and the scales of norms."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 300  # steps
    decay: Literal["cosine", "linear", "constant"] = "cosine"

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.AdamW:
        """The optimiser of the parameters that require gradients."""
        trained = [p for p in parameters if p.requires_grad]
        # a convolution's norm keeps its vector as (C, 1, 1, 1)
        is_vector = [sum(size > 1 for size in p.shape) <= 1 for p in trained]
        vectors = [p for p, yes in zip(trained, is_vector, strict=True) if yes]
        others = [p for p, yes in zip(trained, is_vector, strict=True) if not yes]
        groups = [
            {"params": others, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        is_fused = trained[0].device.type != "cpu"
        return torch.optim.AdamW(groups, lr=self.lr, betas=tuple(self.betas), fused=is_fused)

    def rate(self, step: int, progress: float) -> float:
        """Learning rate at a step (from 0) and a share of the run done (0 to 1); it ends at 0."""
        if self.decay == "cosine":
            remaining = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))
        else:
            remaining = 1.0 - min(progress, 1.0) if self.decay == "linear" else 1.0
        return self.lr * min(1.0, (step + 1) / self.warmup) * remaining
