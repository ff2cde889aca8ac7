from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill.times import DiscreteTimes, FixedRollout, LogNormal, RandomRollout, UniformShift
from turbodiffusion.errors import UserError
from turbodiffusion.samplers.time import rf_to_sigma, rf_to_trig

COUNT = 20000
PERCENT = torch.special.ndtr(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64))


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def ranks(times: Tensor, value: float) -> float:
    return (times <= value).double().mean().item()


# where the published distributions have the quantiles of a normal at -2 ... 2 (and UniformShift its median)
@pytest.mark.parametrize(
    ("times", "quantiles"),
    [
        (LogNormal(0.7, 1.6), [0.076, 0.289, 0.668, 0.909, 0.980]),
        (LogNormal(1.5, 1.6), [0.155, 0.475, 0.818, 0.957, 0.991]),
        (UniformShift(5.0), [None, None, 0.833, None, None]),
    ],
)
def test_quantiles_are_those_of_the_reference(times: Callable[..., Tensor], quantiles: list[float | None]):
    drawn = times(COUNT, rng())
    assert drawn.dtype == torch.float64
    for share, value in zip(PERCENT.tolist(), quantiles, strict=True):
        if value is not None:
            # 4 standard errors of a share, and the rounding of the table to 3 digits (density <= 1 / 0.16)
            error = 4 * (share * (1 - share) / COUNT) ** 0.5 + 0.0005 * 6
            assert ranks(drawn, value) == pytest.approx(share, abs=error)


def test_log_sigma_is_normal():
    log_sigma = rf_to_sigma(LogNormal(0.7, 1.6)(COUNT, rng())).log()
    # 4 standard errors of a mean and of a deviation
    assert log_sigma.mean().item() == pytest.approx(0.7, abs=4 * 1.6 / COUNT**0.5)
    assert log_sigma.std().item() == pytest.approx(1.6, abs=4 * 1.6 / (2 * COUNT) ** 0.5)


@pytest.mark.parametrize(
    "make", [lambda **cut: LogNormal(1.5, 1.6, **cut), lambda **cut: UniformShift(5.0, **cut)]
)
def test_interval_holds_the_whole_distribution_restricted_to_it(make: Callable[..., Callable[..., Tensor]]):
    whole = make()(4 * COUNT, rng())
    for low, high in ((0.0, 0.9), (0.9, 1.0)):
        drawn = make(low=low, high=high)(COUNT, rng().manual_seed(1))
        # the ends are reached through a quantile function and its inverse: rounding
        assert low - 1e-12 <= drawn.min() <= drawn.max() <= high + 1e-12
        inside = whole[(whole >= low) & (whole <= high)]
        middle = inside.median().item()
        # 4 standard errors of a share, here and in what it is compared with
        assert ranks(drawn, middle) == pytest.approx(0.5, abs=2 * (1 / COUNT + 1 / len(inside)) ** 0.5)


def test_empty_interval_is_refused():
    with pytest.raises(UserError, match=r"low=0\.9, high=0\.9"):
        UniformShift(5.0, low=0.9, high=0.9)


@pytest.mark.parametrize("skip", [1, 3])
def test_discrete_times_are_neighbours_on_a_shifted_grid(skip: int):
    times = DiscreteTimes(steps=48, skip=skip, shift=5.0)(1000, rng())
    assert times.shape == (skip + 1, 1000)
    assert 0 <= times.min() < times.max() <= 1
    uniform = times / (5 - 4 * times)
    # rounding, as the shift is undone
    torch.testing.assert_close(
        uniform[:-1] - uniform[1:], torch.full_like(times[1:], 1 / 48), atol=1e-12, rtol=0
    )
    # the first is uniform in [skip / 48, 1]; 4 standard errors of such a mean
    assert uniform[0].mean().item() == pytest.approx((1 + skip / 48) / 2, abs=4 * 0.29 / 1000**0.5)


def test_random_rollout_starts_at_noise_and_never_rises():
    times = RandomRollout(UniformShift(5.0))(4, COUNT, rng())
    assert times.shape == (4, COUNT)
    assert (times[0] == 1).all()
    assert (times[1:] <= times[:-1]).all()
    low = RandomRollout(UniformShift(5.0), start=0.9)(4, COUNT, rng())
    assert torch.equal(low, times.clamp_max(0.9))
    for draws, drawn in enumerate(times[1:], start=1):
        median = 1 - 0.5 ** (1 / draws)
        # the smallest of so many uniform numbers is shifted as each is; 4 standard errors of one half
        assert ranks(drawn, 5 * median / (1 + 4 * median)) == pytest.approx(0.5, abs=2 / COUNT**0.5)


def test_fixed_rollout_takes_the_students_own_times():
    times = FixedRollout()(4, 2, rng())
    expected = torch.tensor([torch.pi / 2, 1.5, 1.4, 1.0], dtype=torch.float64)
    # fp64 rounding of one conversion there and back
    torch.testing.assert_close(rf_to_trig(times), expected.unsqueeze(1).expand(4, 2), atol=1e-14, rtol=0)
    assert (FixedRollout()(1, 2, rng()) == 1).all()
    with pytest.raises(UserError, match="5 steps"):
        FixedRollout()(5, 2, rng())


def test_same_seed_repeats_the_times():
    assert torch.equal(LogNormal(0.7, 1.6)(5, rng()), LogNormal(0.7, 1.6)(5, rng()))
