import pytest
import torch
from torch import nn

from distill.ema import PowerEMA, decay, power
from distill.precision import Masters


def test_power_solves_the_published_cubic():
    # value printed by the reference implementation for a width of 0.1, to the digits given there
    assert power(0.1) == pytest.approx(6.9372, abs=5e-5)


def test_decay_follows_the_published_table():
    # table of the reference's values at k updates, given to three or five digits
    assert decay(0, 0.1) == 0
    for updates, expected, tolerance in ((1, 0.004, 5e-4), (10, 0.469, 5e-4), (1000, 0.9921, 5e-5)):
        assert decay(updates, 0.1) == pytest.approx(expected, abs=tolerance)


def test_average_of_a_ramp_lags_as_the_kernel_says():
    line = nn.Linear(1, 1, bias=False)
    average = PowerEMA(Masters(line), 0.1)
    updates = 2000
    for i in range(updates):
        nn.init.constant_(line.weight, i + 1)
        average.update(Masters(line), i)
    # the kernel (t / T)^power has mean (power + 1) / (power + 2) of T; a sum differs from it by O(1 / T)
    expected = (power(0.1) + 1) / (power(0.1) + 2)
    assert average.module.weight.item() / updates == pytest.approx(expected, abs=2 / updates)


def test_average_of_constant_weights_is_exact_and_needs_no_gradient():
    line = nn.Linear(3, 3)
    average = PowerEMA(Masters(line), 0.1)
    for i in range(5):
        average.update(Masters(line), i)
    for ours, theirs in zip(average.module.parameters(), line.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad


def test_first_update_forgets_the_initial_weights():
    line = nn.Linear(2, 2)
    average = PowerEMA(Masters(line), 0.1)
    nn.init.constant_(line.weight, 7.0)
    average.update(Masters(line), 0)
    assert torch.equal(average.module.weight, line.weight)
