import pytest
import torch
from torch import nn

from distill.optim import Optim


def test_rate_warms_up_linearly():
    optim = Optim(lr=1.0, warmup=4, decay="constant")
    assert [optim.rate(step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("decay", "halfway", "end"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1, 1)]
)
def test_rate_follows_progress_to_its_end(decay: str, halfway: float, end: float):
    optim = Optim(lr=1.0, warmup=1, decay=decay)
    # rounding of one cosine
    assert optim.rate(10, 0.5) == pytest.approx(halfway, abs=1e-15)
    assert optim.rate(10, 1.0) == pytest.approx(end, abs=1e-15)
    assert optim.rate(10, 1.3) == optim.rate(10, 1.0)


def test_weight_decay_touches_matrices_only():
    layer = nn.Linear(2, 2)
    nn.init.ones_(layer.weight)
    nn.init.ones_(layer.bias)
    optimizer = Optim(lr=0.5, weight_decay=0.1).build(layer.parameters())
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    # decoupled decay: w (1 - lr decay); tolerance of one fp32 rounding
    torch.testing.assert_close(layer.weight, torch.full((2, 2), 0.95), rtol=1e-6, atol=0)
    assert torch.equal(layer.bias, torch.ones(2))


def test_frozen_parameters_are_left_out():
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    optimizer = Optim(lr=0.5).build(layer.parameters())
    assert [p for group in optimizer.param_groups for p in group["params"]] == [layer.weight]
