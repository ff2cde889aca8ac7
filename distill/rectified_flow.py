"""Rectified-flow states with one time a sample, and the squared distance that the distillation losses are.

Shapes: x, x0, noise (B, C, T, h, w); s (B,), 1 is noise.  The algebra is fp64 whatever the networks compute
in: near both ends of time it is made of small differences.
"""

from collections.abc import Callable

from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x, s) -> noise - x0, alike


def expand(values: Tensor, like: Tensor) -> Tensor:
    """One number a sample (B,) -> fp64, to be broadcast over a batch of latents."""
    return values.double().view(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, s: Tensor) -> Tensor:
    """The state (1 - s) x0 + s noise."""
    return x0.double().lerp(noise.double(), expand(s, x0))


def predict_x0(velocity: Velocity, x: Tensor, s: Tensor) -> Tensor:
    """x - s v."""
    return x - expand(s, x) * velocity(x, s).double()


def norm(x: Tensor) -> Tensor:
    """Length of each sample, (B,)."""
    return x.flatten(1).norm(dim=1)


def squared_distance(prediction: Tensor, target: Tensor, *, skip_nonfinite: bool) -> Tensor:
    """Sum of squares over each sample (B,); the target gets no gradient.

    skip_nonfinite: a sample with a non-finite number in it counts 0 and sends back exact zeros.
    """
    difference = prediction - target.detach()
    if skip_nonfinite:
        # before the square: a NaN masked after it comes back as NaN times zero
        is_finite = difference.isfinite().flatten(1).all(1)
        difference = difference.where(is_finite.view(-1, *[1] * (difference.ndim - 1)), 0.0)
    return difference.square().flatten(1).sum(1)
