import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from turbodiffusion.samplers.ode import sample_dpmpp, sample_euler, sample_unipc
from turbodiffusion.samplers.time import dpmpp_times, shifted_times, unipc_times

SHAPE = (2, 3, 2, 4, 4)
SAMPLERS = [
    pytest.param(sample_euler, 1, id="euler"),
    pytest.param(sample_dpmpp, 2, id="dpmpp"),
    pytest.param(sample_unipc, 2, id="unipc"),
]


def draw(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def field(x, s):
    """A smooth velocity, nonlinear in x and s, that stands for a network."""
    return torch.tanh(1.5 * x + s) - 0.5 * x * torch.cos(3 * s)


def traced(sampler, noise, times):
    """The states a sampler evaluates the field at, then its result."""
    states = []

    def velocity(x, s):
        states.append(x)
        return field(x, s)

    states.append(sampler(velocity, noise, times))
    return states


def stepped(scheduler, noise, times):
    """The same from a scheduler of diffusers put on the same times."""
    scheduler.set_timesteps(len(times) - 1)
    scheduler.sigmas = times
    scheduler.set_begin_index(0)
    states = [noise]
    for timestep, s in zip(scheduler.timesteps, times[:-1], strict=True):
        states.append(scheduler.step(field(states[-1], s), timestep, states[-1]).prev_sample)
    return states


def unipc():
    return UniPCMultistepScheduler(
        solver_order=2, solver_type="bh2", prediction_type="flow_prediction", use_flow_sigmas=True
    )


def dpmpp():
    return DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy 2 inside diffusers
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 50])
@pytest.mark.parametrize(
    ("sampler", "scheduler", "make", "tolerance"),
    [
        # diffusers' Euler and DPM++ round the sample to fp32 each step: 6e-8, fifty times, partly cancelling
        (sample_euler, FlowMatchEulerDiscreteScheduler, shifted_times, 1e-6),
        (sample_dpmpp, dpmpp, unipc_times, 1e-6),
        (sample_dpmpp, dpmpp, dpmpp_times, 1e-6),
        # its UniPC stays in fp64: roundings
        (sample_unipc, unipc, unipc_times, 1e-13),
    ],
    ids=["euler", "dpmpp", "dpmpp from s = 1", "unipc"],
)
def test_every_step_equals_diffusers(sampler, scheduler, make, tolerance, steps):
    times, noise = make(steps, 5.0), draw(0)
    ours, theirs = traced(sampler, noise, times), stepped(scheduler(), noise, times)
    assert len(ours) == len(theirs) == steps + 1
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() / other.norm() < tolerance


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_unipc_grid_of_diffusers_at_shift_one_is_ours_but_for_its_start(steps):
    # diffusers starts at 1 - 1e-6 and aims at 1/1000, Wan at 0.999 and 0: never more than 1/1000 apart
    scheduler = unipc()
    scheduler.set_timesteps(steps)
    # 1e-7: their grid is fp32
    assert (scheduler.sigmas - unipc_times(steps, 1.0)).abs().max() <= 1e-3 + 1e-7


class Gaussian:
    """Data N(mean, std²): velocity and ODE solution in closed form."""

    mean, std = 0.5, 1.0

    def marginal(self, s):
        """Mean and standard deviation of x_s."""
        return (1 - s) * self.mean, ((1 - s) ** 2 * self.std**2 + s**2).sqrt()

    def velocity(self, x, s):
        mean, std = self.marginal(s)
        return (s - (1 - s) * self.std**2) / std**2 * (x - mean) - self.mean

    def follow(self, x, s, s_end):
        """Where the trajectory through x at s is at s_end."""
        (mean, std), (mean_end, std_end) = self.marginal(s), self.marginal(s_end)
        return mean_end + std_end / std * (x - mean)


def observed_order(sampler, make_times):
    gaussian, noise, errors = Gaussian(), draw(1), []
    for steps in (640, 1280):
        times = make_times(steps)
        exact = gaussian.follow(noise, times[0], times[-1])
        errors.append((sampler(gaussian.velocity, noise, times) - exact).norm())
    return (errors[0] / errors[1]).log2()


@pytest.mark.parametrize(("sampler", "order"), SAMPLERS)
def test_order_of_convergence_between_inner_times(sampler, order):
    observed = observed_order(sampler, lambda steps: torch.linspace(0.95, 0.05, steps + 1).double())
    # the next power of 1/1280 moves the slope by a few hundredths
    assert observed == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("sampler", "order"), SAMPLERS)
def test_order_of_convergence_down_to_zero(sampler, order):
    observed = observed_order(sampler, lambda steps: unipc_times(steps, 1.0))
    # the last steps stay long in λ whatever N, which costs factors of ln N: 1 / ln 1280 = 0.14 of slope each
    assert observed == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("sampler", [sample_euler, sample_dpmpp, sample_unipc])
@pytest.mark.parametrize("start", [1.0, 0.9])
def test_one_step_is_the_x0_prediction(sampler, start):
    times, noise = torch.tensor([start, 0.0], dtype=torch.float64), draw(2)
    x0 = noise - start * field(noise, times[0])
    # one rounding of fp64
    assert torch.allclose(sampler(field, noise, times), x0, rtol=0, atol=1e-15)


@pytest.mark.parametrize("sampler", [sample_euler, sample_dpmpp, sample_unipc])
def test_a_start_from_pure_noise_is_the_limit_of_starts_beside_it(sampler):
    noise = draw(3)
    # the second-order slope out of s = 1 fades as 1 / λ only: at 1 - 1e-15 (λ = -35) 1/25 of it is left
    exact, *near = (
        sampler(field, noise, torch.tensor([s, 0.8, 0.5, 0.2, 0.0], dtype=torch.float64))
        for s in (1.0, 1 - 1e-3, 1 - 1e-15)
    )
    far, close = ((x - exact).norm() / exact.norm() for x in near)
    assert exact.isfinite().all()
    assert close < 0.01
    assert close <= far


@pytest.mark.parametrize("sampler", [sample_euler, sample_dpmpp, sample_unipc])
def test_an_fp32_network_leaves_the_state_in_fp64_and_steps_are_reported(sampler):
    seen, reported = [], []

    def velocity(x, s):
        seen.append((x.dtype, s.dtype, s.shape))
        return field(x, s).float()

    x0 = sampler(velocity, draw(4).float(), unipc_times(3, 5.0), on_step=reported.append)
    assert set(seen) == {(torch.float64, torch.float64, ())}
    assert x0.dtype == torch.float64
    assert reported == [1, 2, 3]
