"""The three names of time, their conversions, the schedules, and the timestep a network is told.

s in [0, 1] is rectified flow, x_s = (1 - s) x0 + s noise; t in [0, π/2] is TrigFlow, x_t = cos t x0 +
sin t noise; sigma in [0, ∞] is EDM, sigma = tan t = s / (1 - s).  1, π/2 and ∞ are noise.  Conversions keep
their input's dtype: pass fp64, since fp32 cannot tell the times near noise apart.  Schedules are s
(steps + 1,), fp64 on the CPU, strictly decreasing to 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from turbodiffusion.errors import UserError

# where Wan's UniPC starts: 1 - 1/1000 as fp32 holds it, a little above 0.999, so that a timestep meant to be
# whole (shift 1, 27 steps) is not truncated to the one below
UNIPC_START = 0.9990000128746033

# the student's intermediate times t; its first is arctan(sigma_max), its last 0
STUDENT_TIMES = (1.5, 1.4, 1.0)

TIMESTEP_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda timestep: timestep,
    "truncate": lambda timestep: timestep.long().double(),
    # spacing 4 above 512: students are trained with times rounded this way
    "bfloat16": lambda timestep: timestep.bfloat16().double(),
}


def rf_to_trig(s: Tensor) -> Tensor:
    """Rectified-flow s -> TrigFlow t."""
    return torch.atan2(s, 1 - s)


def trig_to_rf(t: Tensor) -> Tensor:
    """TrigFlow t -> rectified-flow s.  The states are related by x_s = x_t / (cos t + sin t)."""
    return t.sin() / (t.sin() + t.cos())


def rf_to_sigma(s: Tensor) -> Tensor:
    """Rectified-flow s -> EDM sigma; infinite at s = 1."""
    return s / (1 - s)


def sigma_to_rf(sigma: Tensor) -> Tensor:
    """EDM sigma -> rectified-flow s; 1 at infinity."""
    return 1 / (1 + 1 / sigma)


def shift(s: Tensor, factor: float) -> Tensor:
    """Times moved towards noise for factor > 1, both ends fixed (arXiv:2403.03206)."""
    return factor * s / (1 + (factor - 1) * s)


def unshift(s: Tensor, factor: float) -> Tensor:
    """The inverse of shift."""
    return s / (factor - (factor - 1) * s)


def shifted_times(steps: int, shift: float, *, sigma_max: float | None = None) -> Tensor:
    """Equal steps, shifted, from s = 1 or from sigma_max (reference: rCM's teacher sampler)."""
    if sigma_max is None:
        return _descend(steps, 1.0, shift)
    _check_positive("sigma_max", sigma_max)
    start = unshift(sigma_to_rf(torch.tensor(sigma_max, dtype=torch.float64)), shift)
    return _descend(steps, start.item(), shift)


def dpmpp_times(steps: int, shift: float) -> Tensor:
    """Wan's DPM++ schedule: from s = 1, where sample_dpmpp takes the limit of its formulas."""
    return _descend(steps, 1.0, shift)


def unipc_times(steps: int, shift: float) -> Tensor:
    """Wan's UniPC schedule: equal steps from 0.999, shifted."""
    return _descend(steps, UNIPC_START, shift)


def student_times(steps: int, sigma_max: float) -> Tensor:
    """The rCM student's times: sigma_max, the first steps - 1 of STUDENT_TIMES, 0."""
    choices = range(1, len(STUDENT_TIMES) + 2)
    if steps not in choices:
        raise UserError(f"steps={steps}: a distilled student takes one of {', '.join(map(str, choices))}")
    _check_positive("sigma_max", sigma_max)
    start = torch.tensor(sigma_max, dtype=torch.float64).atan()
    t = torch.tensor([start, *STUDENT_TIMES[: steps - 1], 0], dtype=torch.float64)
    if t[0] <= t[1]:
        raise UserError(
            f"sigma_max={sigma_max}: with steps={steps} it must exceed {t[1].tan().item():.4g}, the noise "
            "level of the second step; raise it, or take one step"
        )
    return trig_to_rf(t)


def to_timestep(s: Tensor, rule: str) -> Tensor:
    """The timestep a network is told at time s: 1000 s under a rule of TIMESTEP_RULES, fp64."""
    if rule not in TIMESTEP_RULES:
        raise UserError(f"timesteps={rule!r}: choose one of {', '.join(TIMESTEP_RULES)}")
    return TIMESTEP_RULES[rule](1000 * s.double())


def _descend(steps: int, start: float, factor: float) -> Tensor:
    if steps < 1:
        raise UserError(f"steps={steps}: take at least one")
    _check_positive("shift", factor)
    # evaluated in the order numpy's linspace does: truncated timesteps then equal Wan's, every one
    s = start - torch.arange(steps, dtype=torch.float64) * (start / steps)
    return torch.cat([shift(s, factor), s.new_zeros(1)])


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{name}={value}: it must be greater than 0")
