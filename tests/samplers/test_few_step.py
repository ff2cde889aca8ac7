import pytest
import torch

from turbodiffusion.samplers.few_step import sample_rcm
from turbodiffusion.samplers.ode import sample_euler
from turbodiffusion.samplers.time import student_times


def stream(seed, shape):
    """draw() of a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator)


def field(x, s):
    return torch.tanh(x + s) - 0.3 * x


def never():
    raise AssertionError("no noise was expected to be drawn")


@pytest.mark.parametrize("ode", [False, True])
def test_one_step_is_the_x0_prediction_of_scaled_noise(ode):
    noise, times = stream(0, (2, 3, 4))(), student_times(1, 80.0)
    x = noise.double() * 80 / 81
    expected = x - 80 / 81 * field(x, times[0])
    # roundings of fp64
    assert torch.allclose(sample_rcm(field, noise, times, never, ode=ode), expected, rtol=0, atol=1e-14)


def test_sde_predicts_and_renoises():
    shape = (2, 3, 4)
    noise, times, reported = stream(0, shape)(), student_times(3, 80.0), []
    draw = stream(1, shape)
    x = noise.double() * times[0]
    for s, s_next in ((times[0], times[1]), (times[1], times[2])):
        x = (1 - s_next) * (x - s * field(x, s)) + s_next * draw().double()
    expected = x - times[2] * field(x, times[2])

    ours = sample_rcm(field, noise, times, stream(1, shape), on_step=reported.append)
    # roundings of fp64
    assert torch.allclose(ours, expected, rtol=0, atol=1e-14)
    assert ours.dtype == torch.float64
    assert reported == [1, 2, 3]


def test_ode_is_euler_from_scaled_noise_and_draws_nothing():
    noise, times = stream(0, (2, 3, 4))(), student_times(4, 200.0)
    ours = sample_rcm(field, noise, times, never, ode=True)
    assert torch.equal(ours, sample_euler(field, times[0] * noise.double(), times))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_an_exact_student_samples_the_data_distribution(steps):
    mean, std, n = 0.5, 0.8, 1_000_000

    def consistency(x, s):
        """The x0 at the end of the ODE through x, for data N(mean, std²)."""
        return mean + std / ((1 - s) ** 2 * std**2 + s**2).sqrt() * (x - (1 - s) * mean)

    x0 = sample_rcm(
        lambda x, s: (x - consistency(x, s)) / s,
        stream(2, (n,))(),
        student_times(steps, 80.0),
        stream(3, (n,)),
    )
    # the chain starts from s_0 noise, without (1 - s_0) x0: one step leaves std (1 - s_0)/s_0 mean of it;
    # beyond that five standard errors
    start = std * mean / 80
    assert x0.mean().item() == pytest.approx(mean, abs=start + 5 * std / n**0.5)
    assert x0.var().item() == pytest.approx(std**2, rel=(std / 80) ** 2 + 5 * (2 / n) ** 0.5)
