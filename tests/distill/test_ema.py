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
        average.update(i)
    # the kernel (t / T)^power has mean (power + 1) / (power + 2) of T; a sum differs from it by O(1 / T)
    expected = (power(0.1) + 1) / (power(0.1) + 2)
    assert average.weights["weight"].item() / updates == pytest.approx(expected, abs=2 / updates)


def test_average_of_constant_weights_is_exact_and_needs_no_gradient():
    line = nn.Linear(3, 3)
    average = PowerEMA(Masters(line), 0.1)
    for i in range(5):
        average.update(i)
    for name, weight in line.named_parameters():
        assert torch.equal(average.weights[name], weight)
        assert not average.weights[name].requires_grad


def test_first_update_forgets_the_initial_weights():
    line = nn.Linear(2, 2)
    average = PowerEMA(Masters(line), 0.1)
    nn.init.constant_(line.weight, 7.0)
    average.update(0)
    assert torch.equal(average.weights["weight"], line.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_is_shown_with_averages_and_gets_its_weights_back(dtype: torch.dtype):
    masters = Masters(nn.Linear(4, 4).to(dtype))
    average = PowerEMA(masters, 0.1)
    with torch.no_grad():
        for weight in masters.weights.values():
            weight.add_(1 / 3)
    masters.publish()
    before = {name: value.clone() for name, value in masters.tensors().items()}
    averaged = {name: value.clone() for name, value in average.weights.items()}
    with average.shown() as module:
        for name, weight in module.named_parameters():
            assert torch.equal(weight, averaged[name].to(dtype))
    for name, weight in masters.tensors().items():
        assert torch.equal(weight, before[name])
        assert torch.equal(masters.module.get_parameter(name), before[name].to(dtype))
        assert torch.equal(average.weights[name], averaged[name])
