"""Data N(MEAN, scale^2): the teacher's velocity and the consistency function are closed forms."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill.dcm import DCMLoss, trig_euler
from distill.rectified_flow import expand
from distill.times import DiscreteTimes
from turbodiffusion.errors import UserError

MEAN = 0.3
SHAPE = (8, 2, 1, 2, 3)
Velocity = Callable[[Tensor, Tensor], Tensor]


def teacher_of(mean: float, scale: float) -> Velocity:
    """E[noise - x0 | x]."""

    def teacher(x: Tensor, s: Tensor) -> Tensor:
        s = expand(s, x)
        variance = (1 - s) ** 2 * scale**2 + s**2
        return (s - (1 - s) * scale**2) / variance * (x - (1 - s) * mean) - mean

    return teacher


def student_of(mean: float, scale: float) -> Velocity:
    """Leads each state to its end of the probability flow of N(mean, scale^2)."""

    def student(x: Tensor, s: Tensor) -> Tensor:
        s = expand(s, x)
        spread = ((1 - s) ** 2 * scale**2 + s**2).sqrt()
        return (x - mean - scale / spread * (x - (1 - s) * mean)) / s

    return student


def loss_of(student: Velocity, teacher: Velocity, steps: int, skip: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, *SHAPE, generator=rng, dtype=torch.float64)
    return DCMLoss()(student, teacher, x0, noise, DiscreteTimes(steps=steps, skip=skip)(SHAPE[0], rng))


def test_exact_student_of_a_path_that_euler_solves_has_zero_loss():
    # TrigFlow's F vanishes for N(0, 1): its states stand still
    loss = loss_of(student_of(0.0, 1.0), teacher_of(0.0, 1.0), steps=48, skip=3)
    assert loss.shape == (SHAPE[0],)
    # the squares of fp64 rounding, of numbers of order one over times of at least 0.05
    assert loss.max() < 1e-25
    assert loss_of(student_of(0.2, 1.0), teacher_of(0.0, 1.0), steps=48).mean() > 1e-6


@pytest.mark.parametrize("skip", [1, 2])
def test_loss_of_the_exact_student_falls_with_the_error_of_euler(skip: int):
    student, teacher = student_of(MEAN, 0.5), teacher_of(MEAN, 0.5)
    coarse, fine = (loss_of(student, teacher, steps, skip).mean().item() for steps in (480, 960))
    # a step errs by h^2, its square is h^4: 16, but for higher orders and times that move by a step
    assert coarse / fine == pytest.approx(16, rel=0.1)


def test_wrong_student_keeps_a_loss_far_above_the_exact_ones():
    teacher = teacher_of(MEAN, 0.5)
    exact, wrong = (loss_of(student, teacher, 48).mean() for student in (student_of(MEAN, 0.5), teacher))
    assert wrong > 10 * exact


def test_euler_step_is_trigflows():
    x, s = torch.randn(2, 1, 1, 1, 1, dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)
    after = trig_euler(lambda x, s: 3 * x, x, s, torch.tensor([0.5, 0.0], dtype=torch.float64))
    quarter = torch.pi / 4
    # by hand: t = π/2 -> π/4 with F = -x_t + v, then t = π/4 -> 0 with F = v / sqrt 2 from x_t = sqrt 2 x
    expected = torch.stack(
        [(x[0] - quarter * 2 * x[0]) / 2**0.5, 2**0.5 * x[1] - quarter * 3 * x[1] / 2**0.5]
    )
    # fp64 rounding
    torch.testing.assert_close(after, expected, atol=1e-14, rtol=1e-14)


def test_gradient_reaches_only_the_student_where_it_starts():
    grads, weight = [], torch.ones((), dtype=torch.float64, requires_grad=True)

    def student(x: Tensor, s: Tensor) -> Tensor:
        grads.append((torch.is_grad_enabled(), s[0].item()))
        return weight * x

    times = torch.tensor([[0.8], [0.6], [0.4]], dtype=torch.float64)
    x0, noise = torch.randn(2, 1, *SHAPE[1:], dtype=torch.float64)
    DCMLoss()(student, lambda x, s: weight * x, x0, noise, times).sum().backward()
    assert sorted(grads) == [(False, 0.4), (True, 0.8)]
    x = 0.2 * x0 + 0.8 * noise
    target = trig_euler(lambda x, s: x, x, times[0], times[1])
    target = 0.6 * trig_euler(lambda x, s: x, target, times[1], times[2])
    # d/dw |x - 0.8 w x - target|^2 at w = 1; fp64 rounding
    expected = (-1.6 * x * (0.2 * x - target.detach())).sum()
    torch.testing.assert_close(weight.grad, expected, atol=1e-12, rtol=1e-12)


def test_skip_longer_than_the_grid_is_refused():
    with pytest.raises(UserError, match="skip=5 must be from 1 to steps=4"):
        DiscreteTimes(steps=4, skip=5)
