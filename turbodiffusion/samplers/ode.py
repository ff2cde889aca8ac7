"""Deterministic samplers as functions over a velocity: Euler, DPM-Solver++ 2M and UniPC.

velocity(x, s) -> noise - x0 at time s, a scalar fp64 CPU tensor; times (N + 1,) as `time.py` makes them.  The
state has the noise's shape and device and is fp64.  on_step(i) is called after step i of 1..N.

All rest on m = x - s v, the prediction of x0.  With a = 1 - s, λ = ln(a / s) and h = λ' - λ, a first-order
step is usually written (s'/s) x - a' (e^-h - 1) m.  That is the straight line from m through x, read at s':
x' = m + (s'/s)(x - m).  It needs no λ, so it holds at s = 1 (λ = -∞) and at s' = 0 (λ' = ∞).  The
second-order methods put a better m into it.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import expm1

from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int], None]


def as_state(noise: Tensor) -> Tensor:
    """The noise as a sampler's state: fp64, or fp32 on Apple's mps, which has no fp64."""
    return noise.float() if noise.device.type == "mps" else noise.double()


def steps(times: Tensor, on_step: OnStep | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of neighbouring times; each is reported to on_step when the next is asked for."""
    for i, pair in enumerate(pairwise(times.double().cpu()), start=1):
        yield pair
        if on_step is not None:
            on_step(i)


def predict_x0(velocity: Velocity, x: Tensor, s: Tensor) -> Tensor:
    """x - s v, in the state's dtype."""
    return x - s.item() * velocity(x, s).to(x.dtype)


def sample_euler(
    velocity: Velocity, noise: Tensor, times: Tensor, *, on_step: OnStep | None = None
) -> Tensor:
    """x0 from noise at times[0]; order 1."""
    x = as_state(noise)
    for s, s_next in steps(times, on_step):
        x = x + (s_next - s).item() * velocity(x, s).to(x.dtype)
    return x


def sample_dpmpp(
    velocity: Velocity, noise: Tensor, times: Tensor, *, on_step: OnStep | None = None
) -> Tensor:
    """x0 from noise at times[0]; order 2, multistep, midpoint (DPM-Solver++ 2M, arXiv:2211.01095).

    The first and the last step are first order.
    """
    x, log_snr, last = as_state(noise), _log_snr(times), len(times) - 2
    m_before = None
    for i, (s, s_next) in enumerate(steps(times, on_step)):
        m = predict_x0(velocity, x, s)
        guess = m + 0.5 * _slope(log_snr, i, m - m_before) if 0 < i < last else m
        x = guess.lerp(x, (s_next / s).item())
        m_before = m
    return x


def sample_unipc(
    velocity: Velocity, noise: Tensor, times: Tensor, *, on_step: OnStep | None = None
) -> Tensor:
    """x0 from noise at times[0]; order 2, multistep, corrected (UniPC, B(h) = e^h - 1, arXiv:2302.04867).

    Each step is predicted as DPM-Solver++ 2M does.  The m found where it lands first corrects the landing,
    then drives the next step: one evaluation a step.
    """
    x, log_snr, last = as_state(noise), _log_snr(times), len(times) - 2
    x_before = m_before = slope = ratio = None
    for i, (s, s_next) in enumerate(steps(times, on_step)):
        m = predict_x0(velocity, x, s)
        if i > 0:
            corrected = m_before + _correction(log_snr, i, m - m_before, slope)
            x = corrected.lerp(x_before, ratio)
        slope = _slope(log_snr, i, m - m_before) if 0 < i < last else None
        x_before, m_before, ratio = x, m, (s_next / s).item()
        guess = m if slope is None else m + 0.5 * slope
        x = guess.lerp(x, ratio)
    return x


def _log_snr(times: Tensor) -> list[float]:
    """λ of every time: -∞ at s = 1 and ∞ at s = 0."""
    return (-times.double().logit()).tolist()


def _slope(log_snr: list[float], i: int, change: Tensor) -> Tensor:
    """m's change over step i, extrapolated from its change over the step before; 0 if that began at s = 1."""
    return change * ((log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1]))


def _correction(log_snr: list[float], i: int, change: Tensor, slope: Tensor | None) -> Tensor:
    """What to add to m over the step that ended at i: m changed by change, slope was foretold (or nothing).

    The weights of the two solve w r^k + w_change = b_k for k = 0, 1, with r = -1 for equal steps in λ.
    """
    if slope is None:
        return 0.5 * change
    h = log_snr[i] - log_snr[i - 1]
    r = (log_snr[i - 2] - log_snr[i - 1]) / h
    phi1 = expm1(-h)
    phi2 = -phi1 / h - 1
    phi3 = -phi2 / h - 1 / 2
    b0, b1 = phi2 / phi1, 2 * phi3 / phi1
    w = (b0 - b1) / (1 - r)
    return w * slope + (b0 - w) * change
