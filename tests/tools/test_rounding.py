"""Weights rounded so that the outputs of what a layer reads are least off."""

import math

import pytest
import torch
from torch import Tensor

from tools.rounding import once, round_jointly
from turbodiffusion.models.int8 import LINEARS


def draw(width: int = 300, outputs: int = 40) -> tuple[Tensor, Tensor]:
    """A weight, and tokens of 8 directions and a little of all: channels tell of each other."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 8, generator=generator) @ torch.randn(8, width, generator=generator)
    return torch.randn(outputs, width, generator=generator), x + 0.1 * torch.randn(
        x.shape, generator=generator
    )


def error(weight: Tensor, numbers: Tensor, step: Tensor, x: Tensor) -> float:
    """Of outputs, in fp64."""
    off = x.double() @ (numbers.double() * step.double().unsqueeze(1) - weight.double()).mT
    return off.norm().item()


@pytest.mark.parametrize("scheme", LINEARS)
def test_outputs_are_less_off_with_numbers_of_the_same_steps(scheme: str) -> None:
    weight, x = draw()
    nearest, step = LINEARS[scheme].quantise(weight)
    numbers, same = round_jointly(weight, x.mT @ x, scheme)
    assert torch.equal(same, step)
    assert (numbers.dtype, numbers.shape) == (nearest.dtype, nearest.shape)
    assert not torch.equal(numbers, nearest)
    # of errors in 300 directions what is left is in the little, sqrt(1 + 8 / 0.01) times smaller, and what it
    # grew by: to a third at least
    assert error(weight, numbers, step, x) < error(weight, nearest, step, x) / 3


@pytest.mark.parametrize("scheme", LINEARS)
def test_of_channels_that_tell_nothing_of_each_other_it_is_the_nearest(scheme: str) -> None:
    weight, _ = draw()
    products = torch.diag(torch.rand(300) + 1)
    got = round_jointly(weight, products, scheme)
    for one, other in zip(got, LINEARS[scheme].quantise(weight), strict=True):
        assert torch.equal(one, other)


def test_two_columns_are_rounded_as_by_hand() -> None:
    # the largest sets a step of 1; the two channels that are not whole are read alike but for a little
    weight = torch.tensor([[127.0, 0.4, 0.4], [127.0, 2.3, -1.4]])
    products = torch.eye(3)
    products[1, 2] = products[2, 1] = 0.98
    numbers, _ = round_jointly(weight, products, "int8")
    # 0.4 to 0 leaves 0.4 for the other, 0.8 to 1; 2.3 to 2 leaves 0.3: -1.1 to -1
    assert numbers.tolist() == [[127, 0, 1], [127, 2, -1]]


def test_columns_of_several_blocks_are_as_good_as_one_by_one() -> None:
    weight, x = draw()
    products = (x.mT @ x).double()
    numbers, step = round_jointly(weight, products, "int8")
    # the definition: the first column is rounded, and least squares say what the others make up for it
    left, wanted = weight.double() / step.double().unsqueeze(1), []
    damped = products + 0.01 * products.diagonal().mean() * torch.eye(300)
    for i in range(300):
        wanted.append(left[:, 0].round())
        made_up = (
            torch.linalg.solve(damped[i + 1 :, i + 1 :], damped[i + 1 :, i]) if i < 299 else torch.empty(0)
        )
        left = left[:, 1:] + (left[:, 0] - wanted[-1]).unsqueeze(1) * made_up
    # in fp64 both are the same up to what is a half to 1e-10
    assert torch.equal(numbers.double(), torch.stack(wanted, 1).clamp(-127, 127))


def test_a_layer_that_read_nothing_is_rounded_to_the_nearest() -> None:
    weight, _ = draw()
    numbers, _ = round_jointly(weight, torch.zeros(300, 300), "int8")
    assert torch.equal(numbers, LINEARS["int8"].quantise(weight)[0])


def test_products_are_divided_and_the_first_answer_stays() -> None:
    weight, x = draw()
    by = torch.logspace(-1, 1, 300).double()
    quantise = once(x.mT @ x, by, "int8")
    first = quantise(weight * by.float())
    wanted, _ = round_jointly(weight * by.float(), ((x / by).mT @ (x / by)).float(), "int8")
    # products of fp32 and of fp64: a half that falls the other way now and then
    assert (first[0] != wanted).double().mean() < 0.02
    assert quantise(torch.full((40, 300), math.nan)) is first
