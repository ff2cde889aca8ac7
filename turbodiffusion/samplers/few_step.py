"""The few-step sampler of rCM students: predict x0, add noise again, repeat."""

from collections.abc import Callable

from torch import Tensor

from turbodiffusion.samplers.ode import OnStep, Velocity, as_state, predict_x0, sample_euler, steps


def sample_rcm(
    velocity: Velocity,
    noise: Tensor,
    times: Tensor,
    draw: Callable[[], Tensor],
    *,
    ode: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """x0 from noise, which is scaled to times[0] here (arXiv:2510.08431).

    velocity, times and on_step are those of `ode.py`.
    draw() -> N(0, 1) noise like the first, asked for after every step but the last.  ode=True integrates the
    velocity instead and draws nothing.
    """
    x = times[0].item() * as_state(noise)
    if ode:
        return sample_euler(velocity, x, times, on_step=on_step)
    for s, s_next in steps(times, on_step):
        x = predict_x0(velocity, x, s)
        if s_next > 0:
            x = x.lerp(draw().to(x), s_next.item())
    return x
