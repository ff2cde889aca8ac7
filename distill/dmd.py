"""Distribution matching distillation (DMD2): a critic learns what the student makes, the teacher corrects it.

Sources: arXiv:2405.14867; arXiv:2510.08431 for the weights and the rollout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from distill.objective import Watch, unwatched
from distill.rectified_flow import Velocity, add_noise, expand, norm, predict_x0, squared_distance

SMALLEST_SCALE = 1e-5


def simulate(student: Velocity, x: Tensor, times: Tensor, draw: Callable[[], Tensor]) -> Tensor:
    """x0 (fp64) as the few-step sampler makes it from the state x at times[0], which is noise at time 1.

    times (N, B) do not increase; draw() -> N(0, 1) like x, asked for N - 1 times.  Only the last of N calls
    builds a graph.
    """
    x = x.double()
    with torch.no_grad():
        for s, s_next in pairwise(times):
            x = add_noise(predict_x0(student, x, s), draw(), s_next)
    return predict_x0(student, x, times[-1])


@dataclass(frozen=True)
class DMDLoss:
    """Its gradient in x0 is 2 (critic's x0 - teacher's x0) / scale: the reverse divergence's, up to a weight.

    scale is each sample's mean |x0 - teacher's x0|; the value of the loss is |gradient / 2|^2.
    """

    skip_nonfinite: bool = False

    def __call__(
        self,
        critic: Velocity,
        teacher: Velocity,
        x0: Tensor,
        noise: Tensor,
        s: Tensor,
        *,
        watch: Watch = unwatched,
    ) -> Tensor:
        """(B,) fp64; x0 (B, C, T, h, w) is the student's, with its graph; noise alike, at times s (B,).

        watch is told "dmd/delta" (root mean square of gradient / 2) and "dmd/scale".
        """
        made = x0.detach().double()
        with torch.no_grad():
            x = add_noise(made, noise, s)
            real, fake = (predict_x0(network, x, s) for network in (teacher, critic))
            scale = (made - real).abs().flatten(1).mean(1).clamp_min(SMALLEST_SCALE)
            delta = (fake - real) / expand(scale, x)
        watch("dmd/delta", norm(delta) / delta[0].numel() ** 0.5, s)
        watch("dmd/scale", scale, s)
        return squared_distance(x0.double(), made - delta, skip_nonfinite=self.skip_nonfinite)


@dataclass(frozen=True)
class CriticLoss:
    """Flow matching on the student's x0, weighted as |x0 - critic's x0|^2 / sin^2 t is in TrigFlow.

    That weight is s^2 + (1 - s)^2 on velocities, finite at both ends.
    """

    skip_nonfinite: bool = False

    def __call__(self, critic: Velocity, x0: Tensor, noise: Tensor, s: Tensor) -> Tensor:
        """(B,) fp64; x0 (B, C, T, h, w) is the student's and gets no gradient; noise alike, times s (B,)."""
        x0 = x0.detach()
        weight = expand(torch.hypot(s, 1 - s), x0)
        v = critic(add_noise(x0, noise, s), s).double()
        target = noise.double() - x0.double()
        return squared_distance(weight * v, weight * target, skip_nonfinite=self.skip_nonfinite)
