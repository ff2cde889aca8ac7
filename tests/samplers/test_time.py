import math

import numpy as np
import pytest
import torch

from turbodiffusion.errors import UserError
from turbodiffusion.samplers.time import (
    dpmpp_times,
    rf_to_sigma,
    rf_to_trig,
    shift,
    shifted_times,
    sigma_to_rf,
    student_times,
    to_timestep,
    trig_to_rf,
    unipc_times,
    unshift,
)

# dense at both ends, where a careless formula loses digits or order
ENDS = torch.logspace(-14, -1, 200, dtype=torch.float64)
MIDDLE = torch.linspace(0.11, 0.89, 100, dtype=torch.float64)
S = torch.cat([torch.zeros(1), ENDS, MIDDLE, 1 - ENDS.flip(0), torch.ones(1)])

# a few roundings of numbers below 1, amplified by shifts up to 16
ROUNDING = 1e-14


@pytest.mark.parametrize(
    ("there", "back"),
    [
        (rf_to_trig, trig_to_rf),
        (rf_to_sigma, sigma_to_rf),
        (lambda s: rf_to_sigma(s).atan(), lambda t: sigma_to_rf(t.tan())),
        (lambda s: shift(s, 16.0), lambda s: unshift(s, 16.0)),
    ],
    ids=["trig", "sigma", "sigma and trig", "shift"],
)
def test_conversions_round_trip_and_keep_order_up_to_both_ends(there, back):
    converted = there(S)
    assert torch.allclose(back(converted), S, rtol=0, atol=ROUNDING)
    # times less than that apart may become one
    assert (converted.diff() >= 0).all()
    assert (converted.diff() > 0)[S.diff() > ROUNDING].all()


def test_trig_time_of_a_known_sigma():
    t = torch.tensor([80.0, 1.0], dtype=torch.float64).atan()
    assert trig_to_rf(t).tolist() == pytest.approx([80 / 81, 0.5], rel=1e-15)


def test_ends_convert_exactly():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert rf_to_sigma(ends).tolist() == [0.0, math.inf]
    assert sigma_to_rf(torch.tensor([0.0, math.inf], dtype=torch.float64)).tolist() == [0.0, 1.0]
    assert rf_to_trig(ends).tolist() == [0.0, math.pi / 2]
    assert shift(ends, 5.0).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("make", [unipc_times, dpmpp_times, shifted_times])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_schedules_descend_to_zero_in_fp64(make, steps):
    times = make(steps, 5.0)
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float64
    assert times[-1] == 0
    assert (times.diff() < 0).all()


@pytest.mark.parametrize("factor", [1, 3, 5, 8, 12, 16])
def test_truncated_timesteps_equal_those_of_wan(factor):
    # the published schedules in numpy (reference: Wan2.2 wan/utils/fm_solvers{,_unipc}.py@00b69de)
    for make, start in ((unipc_times, float(np.float32(0.999))), (dpmpp_times, 1.0)):
        for steps in range(1, 101):
            s = np.linspace(start, 0, steps + 1)[:-1]
            s = factor * s / (1 + (factor - 1) * s)
            ours = make(steps, factor)[:-1]
            assert to_timestep(ours, "truncate").tolist() == np.trunc(s * 1000).tolist(), steps


def test_a_schedule_from_sigma_max_begins_there_after_the_shift():
    times = shifted_times(50, 5.0, sigma_max=5000.0)
    assert times[0].item() == pytest.approx(5000 / 5001, abs=ROUNDING)
    # unshifted, the steps are equal
    steps = unshift(times, 5.0).diff()
    assert torch.allclose(steps, steps.mean().expand(50), rtol=0, atol=ROUNDING)


# models.md 5.2: sigma_max -> s and the timestep told, then the three fixed times
FIXED = [(0.933781061416858, 932), (0.852895394823775, 852), (0.608979049230431, 608)]
STARTS = {
    80: (0.9876543209876543, 988),
    120: (120 / 121, 992),
    200: (0.9950248756218906, 996),
    1600: (1600 / 1601, 1000),
}


@pytest.mark.parametrize("sigma_max", STARTS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_student_table(steps, sigma_max):
    times = student_times(steps, sigma_max)
    table = [STARTS[sigma_max], *FIXED[: steps - 1]]
    # the table prints 15 to 16 digits
    assert times.tolist() == pytest.approx([*(s for s, _ in table), 0.0], rel=0, abs=1e-14)
    assert to_timestep(times[:-1], "bfloat16").tolist() == [timestep for _, timestep in table]


def test_timestep_rules():
    s = torch.tensor([0.98765, 0.0004], dtype=torch.float64)
    assert to_timestep(s, "float").tolist() == pytest.approx([987.65, 0.4], rel=1e-15)
    assert to_timestep(s, "truncate").tolist() == [987.0, 0.0]
    assert to_timestep(s, "bfloat16").tolist()[0] == 988.0
    assert to_timestep(s, "bfloat16").dtype == torch.float64


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: student_times(5, 80.0), "1, 2, 3, 4"),
        (lambda: student_times(0, 80.0), "1, 2, 3, 4"),
        (lambda: student_times(2, 10.0), "14.1"),
        (lambda: student_times(1, -1.0), "sigma_max"),
        (lambda: unipc_times(0, 5.0), "at least one"),
        (lambda: unipc_times(4, 0.0), "shift"),
        (lambda: shifted_times(4, math.nan), "shift"),
        (lambda: shifted_times(4, 5.0, sigma_max=0.0), "sigma_max"),
        (lambda: to_timestep(torch.tensor(0.5), "round"), "float, truncate, bfloat16"),
    ],
)
def test_a_wrong_choice_is_named(wrong, says):
    with pytest.raises(UserError, match=says):
        wrong()
