"""Times that distillation trains at: rectified-flow s, fp64, on the generator's device; B samples.

Every distribution is its quantile function at a uniform number, so it can be cut to an expert's interval.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from turbodiffusion.errors import UserError
from turbodiffusion.samplers.time import STUDENT_TIMES, shift, sigma_to_rf, trig_to_rf, unshift

Times = Callable[[int, Generator], Tensor]  # (count, rng) -> (count,)


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """A distribution of times, given that low <= s <= high."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise UserError(f"low={self.low}, high={self.high}: training times need 0 <= low < high <= 1")


@dataclass(frozen=True)
class LogNormal(_Cut):
    """log sigma is normal, sigma = s / (1 - s) (arXiv:2206.00364); given that low <= s <= high."""

    mean: float
    deviation: float

    def __call__(self, count: int, rng: Generator) -> Tensor:
        """Times (count,)."""
        ends = torch.tensor([self.low, self.high], dtype=torch.float64)
        low, high = torch.special.ndtr((ends.logit() - self.mean) / self.deviation).tolist()
        normal = torch.special.ndtri(_uniform(count, rng, low, high))
        return sigma_to_rf((self.mean + self.deviation * normal).exp())


@dataclass(frozen=True)
class UniformShift(_Cut):
    """Uniform times moved towards noise by `samplers.time.shift`; given that low <= s <= high."""

    shift: float

    def __call__(self, count: int, rng: Generator) -> Tensor:
        """Times (count,)."""
        ends = torch.tensor([self.low, self.high], dtype=torch.float64)
        return shift(_uniform(count, rng, *unshift(ends, self.shift).tolist()), self.shift)


@dataclass(frozen=True)
class DiscreteTimes:
    """Runs of skip + 1 neighbours on a grid of 1 / steps, at a random offset, shifted (for DCMLoss)."""

    steps: int = 48
    skip: int = 1
    shift: float = 5.0

    def __post_init__(self) -> None:
        if not 1 <= self.skip <= self.steps:
            raise UserError(f"skip={self.skip} must be from 1 to steps={self.steps}")

    def __call__(self, count: int, rng: Generator) -> Tensor:
        """Descending times (skip + 1, count)."""
        length = self.skip / self.steps
        start = _uniform(count, rng, 0.0, 1.0 - length)
        lags = torch.linspace(0.0, length, self.skip + 1, dtype=torch.float64, device=rng.device)
        return shift(1 - (start + lags.unsqueeze(1)), self.shift)


@dataclass(frozen=True)
class RandomRollout:
    """Times of a backward simulation: start, then draws, none above the one before it.

    start is 1 (noise), or the highest time of a low-noise expert.
    """

    times: Times
    start: float = 1.0

    def __call__(self, steps: int, count: int, rng: Generator) -> Tensor:
        """Non-increasing times (steps, count)."""
        draws = [self.times(count, rng) for _ in range(steps - 1)]
        start = torch.full((count,), self.start, dtype=torch.float64, device=rng.device)
        return torch.stack([start, *draws]).cummin(0).values


@dataclass(frozen=True)
class FixedRollout:
    """Times of a backward simulation: 1, then the student's own (`samplers.time.STUDENT_TIMES`)."""

    def __call__(self, steps: int, count: int, rng: Generator) -> Tensor:
        """Descending times (steps, count); raises UserError if the student has not that many."""
        if not 1 <= steps <= len(STUDENT_TIMES) + 1:
            raise UserError(
                f"a simulation of {steps} steps at fixed times: the student has 1 to {len(STUDENT_TIMES) + 1}"
            )
        t = torch.tensor([math.pi / 2, *STUDENT_TIMES[: steps - 1]], dtype=torch.float64, device=rng.device)
        return trig_to_rf(t).unsqueeze(1).expand(steps, count)


def _uniform(count: int, rng: Generator, low: float, high: float) -> Tensor:
    u = torch.rand(count, generator=rng, device=rng.device, dtype=torch.float64)
    return low + (high - low) * u
