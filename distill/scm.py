"""Continuous-time consistency distillation (sCM): the student's x0 must not move along the teacher's path.

Sources: arXiv:2410.11081 (objective, normalisation), arXiv:2510.08431 (rCM's form of it).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.jvp import jvp
from distill.objective import Watch, unwatched
from distill.rectified_flow import Velocity, add_noise, expand, norm, squared_distance
from turbodiffusion.errors import UserError

WARMUPS = ("code", "paper")
JVPS = ("forward_ad", "finite_difference")


class Tangent(NamedTuple):
    """How the student lags behind the teacher at a state x; all like x."""

    gap: Tensor  # teacher's velocity - student's
    drift: Tensor  # d student / ds along the teacher's path
    x: Tensor


@dataclass(frozen=True)
class SCMLoss:
    """The square of a step that, to first order, keeps the student's x0 still along the teacher's path.

    Written for TrigFlow's F = (x (cos t - sin t) + v) / n', n' = cos t + sin t, where the path's tangent is
    g = cos t d(x0) / dt; the loss is |F - stop(F) - g / (|g| + offset)|^2.  It is close to 1 whatever the
    student: watch |g| instead.  In rectified flow no F is needed: with n = 1 / n' = |(s, 1 - s)|,
    g = (1 - s) n (gap - s drift) after warm-up.

    Before, r = step / warmup_steps fades the unstable terms in.  "paper" scales all of the tangent by r,
    which at 0 leaves matching of velocities; "code" (rCM as released) all but dF/dt.  jvp
    "finite_difference" takes the drift from two passes, times s ± difference (second order): for networks
    that compute in fp32 and are told times unrounded.
    """

    warmup_steps: int = 0
    warmup: str = "code"
    jvp: str = "forward_ad"
    difference: float = 1e-4
    offset: float = 0.1
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.warmup not in WARMUPS:
            raise UserError(f"warmup={self.warmup!r}: choose {' or '.join(WARMUPS)}")
        if self.jvp not in JVPS:
            raise UserError(f"jvp={self.jvp!r}: choose {' or '.join(JVPS)}")

    def __call__(
        self,
        student: Velocity,
        teacher: Velocity,
        x0: Tensor,
        noise: Tensor,
        s: Tensor,
        step: int,
        *,
        watch: Watch = unwatched,
    ) -> Tensor:
        """(B,) fp64 at times s (B,) and update `step`; x0, noise (B, C, T, h, w).

        watch is told "scm/g", "scm/drift" (g's share of it), "scm/gap", all norms in F, and "scm/cosine" of
        g with the gap.
        """
        x = add_noise(x0, noise, s)
        with torch.no_grad():
            target = teacher(x, s).double()
            drift = self._drift(student, x, s, target)
        v = student(x, s).double()
        tangent = Tangent(target - v.detach(), drift, x)
        g = self._g(tangent, expand(s, x), step)
        _report(watch, tangent, g, s)
        direction = g / (expand(norm(g), g) + self.offset)
        F_student = _n(expand(s, x)) * v  # but for a term in x, which the difference cancels
        return squared_distance(F_student, F_student + direction, skip_nonfinite=self.skip_nonfinite)

    def _drift(self, student: Velocity, x: Tensor, s: Tensor, velocity: Tensor) -> Tensor:
        """Derivative of student(x, s) along (velocity, 1)."""
        if self.jvp == "forward_ad":
            return jvp(student, (x, s), (velocity, torch.ones_like(s)))[1].double()
        h = self.difference
        after, before = (student(x + e * velocity, s + e).double() for e in (h, -h))
        return (after - before) / (2 * h)

    def _g(self, tangent: Tangent, s: Tensor, step: int) -> Tensor:
        """-cos t sqrt(1 - (r sin t)^2) (F - F_teacher) - cos t sin t (r x_t + k dF/dt), k = 1 or r."""
        gap, drift, x = tangent
        r = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        k = 1.0 if self.warmup == "code" else r
        n = _n(s)
        root = ((1 - s) ** 2 + (1 - r * r) * s**2).sqrt()  # n sqrt(1 - (r sin t)^2), free of cancellation
        along = (root - k * s * (1 - 2 * s)) / n**2
        return (1 - s) * n * (along * gap - k * s * drift + (k - r) * s / n**4 * x)


def _n(s: Tensor) -> Tensor:
    """1 / (cos t + sin t)."""
    return torch.hypot(s, 1 - s)


def _report(watch: Watch, tangent: Tangent, g: Tensor, s: Tensor) -> None:
    n = _n(s)
    watch("scm/g", norm(g), s)
    watch("scm/drift", (1 - s) * n * s * norm(tangent.drift), s)
    watch("scm/gap", n * norm(tangent.gap), s)
    watch("scm/cosine", F.cosine_similarity(g.flatten(1), tangent.gap.flatten(1)), s)
