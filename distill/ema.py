"""Power-function averages of weights (arXiv:2312.02696, equation 127; reference: rCM's PowerEMA)."""

from copy import deepcopy
from functools import cache

import numpy as np
import torch

from distill.precision import Masters


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
    """An averaged fp32 copy of a module, for sampling and shipping; it follows the fp32 masters.

    The kernel's width grows with training, so a short run and a long one need no different setting.
    """

    def __init__(self, masters: Masters, width: float):
        self.module = deepcopy(masters.module).float().requires_grad_(False).eval()
        self.width = width

    @torch.no_grad()
    def update(self, masters: Masters, updates: int) -> None:
        """Move towards the masters; `updates` counts the earlier calls."""
        ours = [self.module.get_parameter(name) for name in masters.weights]
        torch._foreach_lerp_(ours, list(masters.weights.values()), 1 - decay(updates, self.width))
