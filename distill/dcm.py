"""Discrete-time consistency distillation (dCM): the student's x0 must agree at neighbouring times.

It needs no derivative, and is biased by the length of the teacher's steps.  Sources: arXiv:2303.01469;
reference: rCM, cm_type=dcm.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from distill.objective import Watch, unwatched
from distill.rectified_flow import Velocity, add_noise, expand, predict_x0, squared_distance
from turbodiffusion.samplers.time import rf_to_trig


@dataclass(frozen=True)
class DCMLoss:
    """Squared distance of the student's x0 to its own x0 further down the teacher's path."""

    skip_nonfinite: bool = False

    def __call__(
        self,
        student: Velocity,
        teacher: Velocity,
        x0: Tensor,
        noise: Tensor,
        times: Tensor,
        step: int = 0,
        *,
        watch: Watch = unwatched,
    ) -> Tensor:
        """(B,) fp64; x0, noise (B, C, T, h, w); the teacher walks down times (K + 1, B), K >= 1.

        step is that of `SCMLoss`, and of no account here; watch is told "dcm/distance", the loss's root.
        """
        x = start = add_noise(x0, noise, times[0])
        with torch.no_grad():
            for s, s_next in pairwise(times):
                x = trig_euler(teacher, x, s, s_next)
            target = predict_x0(student, x, times[-1])
        prediction = predict_x0(student, start, times[0])
        loss = squared_distance(prediction, target, skip_nonfinite=self.skip_nonfinite)
        watch("dcm/distance", loss.detach().sqrt(), times[0])
        return loss


def trig_euler(velocity: Velocity, x: Tensor, s: Tensor, s_next: Tensor) -> Tensor:
    """An Euler step of TrigFlow's ODE dx/dt = F between rectified-flow states x at s and s_next (B,)."""
    t, t_next = (expand(rf_to_trig(time.double()), x) for time in (s, s_next))
    scale, scale_next = (time.cos() + time.sin() for time in (t, t_next))  # TrigFlow state / ours
    x_trig = scale * x
    F = ((t.cos() - t.sin()) * x_trig + velocity(x, s).double()) / scale
    return (x_trig - (t - t_next) * F) / scale_next
