"""Power-function averages of weights (arXiv:2312.02696, equation 127; reference: rCM's PowerEMA)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from distill.precision import Masters
from distill.sharding import local


@cache
def power(width: float) -> float:
    """The exponent whose averaging kernel has a standard deviation of `width` times the training so far.

    Largest real root of g^3 + 7 g^2 + (16 - w^-2) g + (12 - w^-2); width 0.1 gives 6.9372.
    """
    inverse = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots[np.isreal(roots)].real.max())


def decay(updates: int, width: float) -> float:
    """Share of the old average kept at update 0, 1, 2 ...: (1 - 1 / (k + 1))^(power + 1), 0 at the first."""
    return (1 - 1 / (updates + 1)) ** (power(width) + 1)


class PowerEMA:
    """fp32 averages of the weights that train, by name, for sampling and shipping.

    The kernel's width grows with training, so a short run and a long one need no different setting.
    """

    def __init__(self, masters: Masters, width: float):
        self.masters, self.width = masters, width
        self.weights = {name: weight.detach().clone() for name, weight in masters.weights.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move towards the masters; `updates` counts the earlier calls."""
        ours, theirs = self._pairs()
        torch._foreach_lerp_(ours, theirs, 1 - decay(updates, self.width))

    @contextmanager
    def shown(self) -> Iterator[nn.Module]:
        """The module with the averages in place of what trains, until the block is left."""
        self._exchange()
        try:
            yield self.masters.module
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for ours, theirs in zip(*self._pairs(), strict=True):
            held = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(held)
        self.masters.publish()

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        return tuple([local(w) for w in weights.values()] for weights in (self.weights, self.masters.weights))
