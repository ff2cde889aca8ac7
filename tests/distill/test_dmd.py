"""Normal distributions: velocities, scores and the consistency function are closed forms."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill.dmd import CriticLoss, DMDLoss, simulate
from distill.rectified_flow import expand, predict_x0
from distill.times import FixedRollout, RandomRollout, UniformShift

MEAN, SCALE = 0.3, 0.5  # the teacher's data
MADE_MEAN, MADE_SCALE = -0.1, 0.8  # what the student makes
SHAPE = (5, 2, 1, 2, 3)
Velocity = Callable[[Tensor, Tensor], Tensor]


def velocity_of(mean: float, scale: float) -> Velocity:
    """E[noise - x0 | x] for x0 of N(mean, scale^2)."""

    def velocity(x: Tensor, s: Tensor) -> Tensor:
        s = expand(s, x)
        variance = (1 - s) ** 2 * scale**2 + s**2
        return (s - (1 - s) * scale**2) / variance * (x - (1 - s) * mean) - mean

    return velocity


def score_of(mean: float, scale: float, x: Tensor, s: Tensor) -> Tensor:
    """Gradient of log p_s(x)."""
    return -(x - (1 - s) * mean) / ((1 - s) ** 2 * scale**2 + s**2)


def student(x: Tensor, s: Tensor) -> Tensor:
    """Leads each state to its end of the teacher's probability flow."""
    s = expand(s, x)
    spread = ((1 - s) ** 2 * SCALE**2 + s**2).sqrt()
    return (x - MEAN - SCALE / spread * (x - (1 - s) * MEAN)) / s


def draw(count: int = SHAPE[0]) -> tuple[Tensor, Tensor, Tensor]:
    """The student's x0, noise and times; always the same."""
    rng = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, count, *SHAPE[1:], generator=rng, dtype=torch.float64)
    return MADE_MEAN + MADE_SCALE * x0, noise, UniformShift(5.0)(count, rng)


def gradient(critic: Velocity, teacher: Velocity) -> tuple[Tensor, Tensor]:
    """Of the DMD loss, in x0; and the loss."""
    x0, noise, s = draw()
    x0.requires_grad_()
    loss = DMDLoss()(critic, teacher, x0, noise, s)
    return torch.autograd.grad(loss.sum(), x0)[0], loss.detach()


def test_dmd_gradient_is_the_difference_of_scores():
    made, real = (MADE_MEAN, MADE_SCALE), (MEAN, SCALE)
    got, loss = gradient(velocity_of(*made), velocity_of(*real))
    x0, noise, s = draw()
    r = expand(s, x0)
    x = (1 - r) * x0 + r * noise
    # Tweedie: x0 = (x + s^2 score) / (1 - s)
    x0_real = (x + r**2 * score_of(*real, x, r)) / (1 - r)
    scale = (x0 - x0_real).abs().flatten(1).mean(1)
    delta = r**2 / (1 - r) * (score_of(*made, x, r) - score_of(*real, x, r)) / expand(scale, x)
    # fp64 rounding, divided by 1 - s, at least 1e-2 here
    torch.testing.assert_close(got, 2 * delta, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(loss, delta.square().flatten(1).sum(1), atol=1e-11, rtol=1e-11)


def test_dmd_moves_samples_from_what_is_made_towards_the_data():
    # many numbers a sample, as in a video, so that each sample's scale is near its mean
    x0 = MADE_MEAN + MADE_SCALE * torch.randn(20, 1, 1, 16, 16, dtype=torch.float64)
    s = torch.full((20,), 0.3, dtype=torch.float64)
    x0.requires_grad_()
    networks = velocity_of(MADE_MEAN, MADE_SCALE), velocity_of(MEAN, SCALE)
    loss = DMDLoss()(*networks, x0, torch.randn_like(x0), s).sum()
    moved = x0 - 0.05 * torch.autograd.grad(loss, x0)[0]
    # the same noise for both: only the sign of the correction is in question
    assert moved.mean() > x0.mean()
    assert moved.std() < x0.std()


def test_dmd_gradient_vanishes_where_critic_and_teacher_agree():
    got, loss = gradient(velocity_of(MEAN, SCALE), velocity_of(MEAN, SCALE))
    # x0 - (x0 - 0): exact
    assert not got.any()
    assert not loss.any()


def test_dmd_stays_finite_where_the_student_is_already_perfect():
    x0, noise, _ = draw()
    s = torch.zeros(SHAPE[0], dtype=torch.float64)
    # at time 0 the teacher returns x0 itself: the scale is 0
    assert not DMDLoss()(lambda x, s: x, lambda x, s: -x, x0, noise, s).any()


def test_dmd_gradient_reaches_the_student_alone():
    weights = [torch.ones((), dtype=torch.float64, requires_grad=True) for _ in range(3)]
    critic, teacher, made = ((lambda x, s, w=w: w * x.sin()) for w in weights)
    noise, s = draw()[1:]
    start, times = torch.randn_like(noise), torch.ones(1, SHAPE[0], dtype=torch.float64)
    x0 = simulate(made, start, times, lambda: noise)
    DMDLoss()(critic, lambda x, s: 2 * teacher(x, s), x0, noise, s).sum().backward()
    assert [w.grad is not None for w in weights] == [False, False, True]
    assert weights[2].grad != 0


def test_dmd_reports_the_size_of_its_correction():
    seen = {}
    networks = velocity_of(MADE_MEAN, MADE_SCALE), velocity_of(MEAN, SCALE)
    loss = DMDLoss()(*networks, *draw(), watch=lambda name, values, times: seen.update({name: values}))
    # fp64 rounding; 12 numbers a sample
    torch.testing.assert_close(12 * seen["dmd/delta"] ** 2, loss, atol=1e-12, rtol=1e-12)
    assert seen["dmd/scale"].shape == (SHAPE[0],)


def test_critic_loss_is_the_weighted_error_of_x0():
    x0, noise, s = draw()
    loss = CriticLoss()(lambda x, s: x.sin(), x0, noise, s)
    r = expand(s, x0)
    error = x0 - predict_x0(lambda x, s: x.sin(), (1 - r) * x0 + r * noise, s)
    sin2 = r**2 / (r**2 + (1 - r) ** 2)
    # fp64 rounding, divided by sin^2 t, at least 0.01 here
    torch.testing.assert_close(loss, (error.square() / sin2).flatten(1).sum(1), atol=1e-12, rtol=1e-12)


def test_critic_loss_is_finite_at_both_ends():
    x0, noise, _ = draw(2)
    loss = CriticLoss()(lambda x, s: x, x0, noise, torch.tensor([0.0, 1.0], dtype=torch.float64))
    errors = (2 * x0 - noise)[0], x0[1]
    # fp64 rounding
    torch.testing.assert_close(
        loss, torch.stack([error.square().sum() for error in errors]), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("time", [0.2, 0.7])
def test_critic_that_fits_best_has_the_score_of_what_is_made(time: float):
    count = 20000
    x0 = MADE_MEAN + MADE_SCALE * torch.randn(count, 1, 1, 1, 1, dtype=torch.float64)
    s = torch.full((count,), time, dtype=torch.float64)
    line = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    noise = torch.randn_like(x0)

    def total(line: Tensor) -> Tensor:
        return CriticLoss()(lambda x, s: line[0] * x + line[1], x0, noise, s).sum()

    # quadratic in the line: one Newton step is the optimum
    slope = torch.autograd.grad(total(line), line)[0]
    best = -torch.linalg.solve(torch.autograd.functional.hessian(total, line), slope)
    ends = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1, 1)
    expected = velocity_of(MADE_MEAN, MADE_SCALE)(ends, s[:2]).flatten()
    # 5 standard errors of a regression with residuals and inputs of order 1, at two points from the mean
    torch.testing.assert_close(best[1] + best[0] * ends.flatten(), expected, atol=5 * 2 / count**0.5, rtol=0)


def test_critic_sends_no_gradient_to_the_student():
    x0, noise, s = draw()
    x0.requires_grad_()
    assert not CriticLoss()(velocity_of(MEAN, SCALE), x0, noise, s).requires_grad


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_simulation_by_the_exact_student_keeps_the_distribution(steps: int):
    count, rng = 20000, torch.Generator().manual_seed(0)
    for rollout in (RandomRollout(UniformShift(5.0)), FixedRollout()):
        times = rollout(steps, count, rng)
        noises = torch.randn(steps, count, 1, 1, 1, 1, generator=rng, dtype=torch.float64)
        x0 = simulate(student, noises[0], times, iter(noises[1:]).__next__)
        # 4 standard errors of a mean and of a deviation
        assert x0.mean().item() == pytest.approx(MEAN, abs=4 * SCALE / count**0.5)
        assert x0.std().item() == pytest.approx(SCALE, abs=4 * SCALE / (2 * count) ** 0.5)


def test_simulation_follows_the_times_and_learns_from_its_last_step_alone():
    seen, states, weight = [], [], torch.ones((), dtype=torch.float64, requires_grad=True)

    def spy(x: Tensor, s: Tensor) -> Tensor:
        seen.append((s.tolist(), torch.is_grad_enabled()))
        states.append(x)
        return weight * student(x, s)

    times = torch.tensor([[1.0, 1.0], [0.9, 0.8], [0.5, 0.7]], dtype=torch.float64)
    noises = torch.randn(3, 2, *SHAPE[1:], dtype=torch.float64)
    x0 = simulate(spy, noises[0], times, iter(noises[1:]).__next__)
    assert seen == [([1.0, 1.0], False), ([0.9, 0.8], False), ([0.5, 0.7], True)]
    before = predict_x0(student, states[1], times[1])
    r = expand(times[2], before)
    # fp64 rounding
    torch.testing.assert_close(states[2], (1 - r) * before + r * noises[2], atol=1e-14, rtol=1e-14)
    x0.sum().backward()
    torch.testing.assert_close(weight.grad, -(r * student(states[2], times[2])).sum(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("is_critic", [False, True])
def test_sample_with_nan_is_skipped_or_seen_as_configured(is_critic: bool):
    x0, noise, s = draw()
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    poison = torch.zeros_like(x0)
    poison[1, 0, 0, 0, 0] = torch.nan

    def loss(skip: bool) -> Tensor:
        if is_critic:
            return CriticLoss(skip_nonfinite=skip)(lambda x, s: weight * x, x0, noise + poison, s)
        networks = (lambda x, s: x + poison), velocity_of(MEAN, SCALE)
        return DMDLoss(skip_nonfinite=skip)(*networks, weight * x0, noise, s)

    assert loss(False).isnan().tolist() == [False, True, False, False, False]
    skipped = loss(True)
    assert skipped[1] == 0
    assert torch.equal(skipped[2:], loss(False)[2:])
    # NaN in the critic's own input reaches its weights whatever the loss sends back: not this loss's to mend
    if not is_critic:
        skipped.sum().backward()
        assert weight.grad.isfinite()
