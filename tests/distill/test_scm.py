"""Data N(MEAN, SCALE^2): the teacher's velocity and the consistency function are closed forms."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill.rectified_flow import expand
from distill.scm import SCMLoss
from distill.times import LogNormal
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel
from turbodiffusion.samplers.denoiser import Denoiser
from turbodiffusion.samplers.time import rf_to_trig

MEAN, SCALE = 0.3, 0.5
SHAPE = (6, 2, 1, 2, 3)
Velocity = Callable[[Tensor, Tensor], Tensor]


def teacher(x: Tensor, s: Tensor) -> Tensor:
    """E[noise - x0 | x]."""
    s = expand(s, x)
    variance = (1 - s) ** 2 * SCALE**2 + s**2
    return (s - (1 - s) * SCALE**2) / variance * (x - (1 - s) * MEAN) - MEAN


def student_of(mean: float, scale: float) -> Velocity:
    """Leads each state to its end of the probability flow of N(mean, scale^2)."""

    def student(x: Tensor, s: Tensor) -> Tensor:
        s = expand(s, x)
        spread = ((1 - s) ** 2 * scale**2 + s**2).sqrt()
        return (x - mean - scale / spread * (x - (1 - s) * mean)) / s

    return student


def curved(x: Tensor, s: Tensor) -> Tensor:
    """A velocity that mixes pixels and solves nothing."""
    return torch.sin(2 * x + 3 * expand(s, x)) * x.roll(1, -1) + expand(s, x).exp() * x.square().mean(
        1, keepdim=True
    )


def draw(count: int = SHAPE[0]) -> tuple[Tensor, Tensor, Tensor]:
    """x0, noise and times as trained at; always the same."""
    rng = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, count, *SHAPE[1:], generator=rng, dtype=torch.float64)
    return MEAN + SCALE * x0, noise, LogNormal(0.7, 1.6)(count, rng)


def direction(
    loss: SCMLoss, student: Velocity, drawn: tuple[Tensor, Tensor, Tensor], step: int = 0
) -> Tensor:
    """g / (|g| + offset), read off the gradient that reaches the student: -2 |(s, 1 - s)| times that."""
    x0, noise, s = drawn
    push = torch.zeros_like(x0, requires_grad=True)
    loss(lambda x, s: student(x, s) + push, teacher, x0, noise, s, step).sum().backward()
    return -push.grad / (2 * expand(torch.hypot(s, 1 - s), x0))


def trigflow_g(student: Velocity, drawn: tuple[Tensor, Tensor, Tensor], r: float, k: float) -> Tensor:
    """The same from TrigFlow's own formulas, differentiating F(x_t, t) by torch.func."""
    x0, noise, s = drawn
    t = rf_to_trig(s)
    cos, sin = expand(t.cos(), x0), expand(t.sin(), x0)

    def wrap(velocity: Velocity) -> Velocity:
        def wrapped(x: Tensor, t: Tensor) -> Tensor:
            cos, sin = expand(t.cos(), x), expand(t.sin(), x)
            v = velocity(x / (cos + sin), t.sin() / (t.cos() + t.sin()))
            return ((cos - sin) * x + v) / (cos + sin)

        return wrapped

    x = cos * x0 + sin * noise
    F_teacher = wrap(teacher)(x, t)
    F, dF = torch.func.jvp(wrap(student), (x, t), (F_teacher, torch.ones_like(t)))
    return -cos * (1 - (r * sin) ** 2).sqrt() * (F - F_teacher) - cos * sin * (r * x + k * dF)


def normalised(g: Tensor) -> Tensor:
    return g / (expand(g.flatten(1).norm(dim=1), g) + 0.1)


def test_exact_student_has_zero_loss_and_a_wrong_one_has_not():
    drawn = draw(200)
    exact = SCMLoss()(student_of(MEAN, SCALE), teacher, *drawn, 0)
    assert exact.shape == (200,)
    # |g| is fp64 rounding, up to 1 / s of it in the student: (1e-13 / 0.1)^2 at most
    assert exact.max() < 1e-20
    for wrong in (teacher, student_of(MEAN, 1.2 * SCALE), student_of(MEAN + 0.1, SCALE)):
        assert SCMLoss()(wrong, teacher, *drawn, 0).mean() > 0.1


def test_exact_student_is_no_fixed_point_before_warmup_ends():
    for warmup in ("code", "paper"):
        loss = SCMLoss(warmup_steps=10, warmup=warmup)
        assert loss(student_of(MEAN, SCALE), teacher, *draw(), 5).min() > 1e-6
        assert loss(student_of(MEAN, SCALE), teacher, *draw(), 10).max() < 1e-20


@pytest.mark.parametrize("step", [0, 3, 10, 11])
@pytest.mark.parametrize("warmup", ["code", "paper"])
def test_tangent_is_trigflows(warmup: str, step: int):
    r = min(1.0, step / 10)
    expected = normalised(trigflow_g(curved, draw(), r, k=1.0 if warmup == "code" else r))
    got = direction(SCMLoss(warmup_steps=10, warmup=warmup), curved, draw(), step)
    # fp64 rounding through two different orders of the same arithmetic
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_tangent_is_finite_at_both_ends_of_time():
    x0, noise, _ = draw(2)
    s = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for warmup in ("code", "paper"):
        for step in (0, 5, 10):
            loss = SCMLoss(warmup_steps=10, warmup=warmup)
            assert direction(loss, curved, (x0, noise, s), step).isfinite().all()


def test_paper_warmup_starts_as_velocity_matching_and_code_does_not():
    drawn = draw()
    assert not SCMLoss(warmup_steps=10, warmup="paper")(teacher, teacher, *drawn, 0).any()
    assert SCMLoss(warmup_steps=10, warmup="code")(teacher, teacher, *drawn, 0).min() > 1e-6


def test_no_warmup_is_the_end_of_any():
    for warmup in ("code", "paper"):
        ended = direction(SCMLoss(warmup_steps=10, warmup=warmup), curved, draw(), 10)
        assert torch.equal(ended, direction(SCMLoss(), curved, draw(), 0))


def test_normalisation_leaves_g_over_g_plus_offset():
    drawn, seen = draw(), {}
    watch = lambda name, values, times: seen.update({name: values})  # noqa: E731
    loss = SCMLoss(offset=0.1)(curved, teacher, *drawn, 0, watch=watch)
    g = trigflow_g(curved, drawn, 1.0, 1.0).flatten(1).norm(dim=1)
    # fp64 rounding
    torch.testing.assert_close(seen["scm/g"], g, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(loss, (g / (g + 0.1)) ** 2, atol=1e-12, rtol=0)


def test_finite_difference_is_second_order():
    exact = direction(SCMLoss(), curved, draw())
    errors = [
        (direction(SCMLoss(jvp="finite_difference", difference=h), curved, draw()) - exact).abs().max().item()
        for h in (1e-2, 1e-3, 1e-4)
    ]
    # a hundredth for a tenth of h; terms in h^4 at one end, rounding 1e-16 / h at the other are below 1 %
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.01)
    assert errors[1] / errors[2] == pytest.approx(100, rel=0.01)


def test_finite_difference_on_a_wan_model_errs_by_the_curvature_of_its_fastest_clock():
    shape = (3, 4, 2, 4, 4)
    network = WanModel(
        dim=32, ffn_dim=64, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=16, text_length=8
    )
    torch.nn.init.normal_(network.head.head.weight, std=0.1)
    text, negative = torch.randn(2, 3, 8, 16)
    drawn = *torch.randn(2, *shape), torch.tensor([0.3, 0.7, 0.95], dtype=torch.float64)

    def drift(loss: SCMLoss) -> Tensor:
        student = Denoiser(network=network, context=text)
        guided = Denoiser(network=network, context=text, negative=negative, guidance=5.0)
        seen = {}
        loss(student, guided, *drawn, 0, watch=lambda name, values, times: seen.update({name: values}))
        return seen["scm/drift"]

    exact = drift(SCMLoss())
    assert exact.min() > 0.1
    difference = drift(SCMLoss(jvp="finite_difference", difference=1e-4))
    # sin(1000 s) has the relative error (1000 h)^2 / 6, 0.17 %; twice it for layers that bend it further
    torch.testing.assert_close(difference, exact, rtol=2 * 0.0017, atol=0)


@pytest.mark.slow
def test_training_from_scratch_finds_the_exact_student():
    size, batch, steps, rng = 4, 128, 3000, torch.Generator().manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(size + 2, 64),
        torch.nn.SiLU(),
        torch.nn.Linear(64, 64),
        torch.nn.SiLU(),
        torch.nn.Linear(64, size),
    )

    def student(x: Tensor, s: Tensor) -> Tensor:
        clock = s.float().unsqueeze(1)
        return network(torch.cat((x.float(), clock, torch.sin(3 * clock)), dim=1))

    # the paper's warm-up starts as velocity matching, so it stands for pretraining too
    loss, times = SCMLoss(warmup_steps=500, warmup="paper"), LogNormal(0.0, 1.6)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3, betas=(0.0, 0.999))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        x0, noise = torch.randn(2, batch, size, generator=rng, dtype=torch.float64)
        loss(student, teacher, MEAN + SCALE * x0, noise, times(batch, rng), step).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    noise, one = torch.randn(10000, size, generator=rng, dtype=torch.float64), torch.ones(10000)
    with torch.no_grad():
        made, euler = (noise - velocity(noise, one) for velocity in (student, teacher))
    error, before = ((end - MEAN - SCALE * noise).square().mean().sqrt() for end in (made, euler))
    # 0.009 and 0.010 for two seeds; one Euler step of the teacher errs by SCALE, for it makes the mean
    assert error < 0.02 < 0.45 < before


def test_gradient_reaches_the_student_alone():
    weights = {
        name: torch.ones((), dtype=torch.float64, requires_grad=True) for name in ("student", "teacher")
    }
    loss = SCMLoss()(
        lambda x, s: weights["student"] * curved(x, s),
        lambda x, s: weights["teacher"] * teacher(x, s),
        *draw(),
        0,
    )
    loss.sum().backward()
    assert weights["student"].grad is not None
    assert weights["teacher"].grad is None


def test_fp32_network_gives_the_fp64_loss_to_its_own_precision():
    x0, noise, s = draw()
    double = SCMLoss()(curved, teacher, x0, noise, s, 0)
    single = SCMLoss()(lambda x, s: curved(x.float(), s.float()), teacher, x0.float(), noise.float(), s, 0)
    assert single.dtype == torch.float64
    # relative rounding 6e-8 of states and velocities, amplified by derivatives of order 10
    torch.testing.assert_close(single, double, atol=1e-6, rtol=0)


def test_sample_with_nan_is_skipped_or_seen_as_configured():
    drawn = draw()

    def broken(x: Tensor, s: Tensor) -> Tensor:
        v = teacher(x, s).clone()
        v[1, 0, 0, 0, 0] = torch.nan
        return v

    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    losses = {
        skip: SCMLoss(skip_nonfinite=skip)(lambda x, s: weight * curved(x, s), broken, *drawn, 0)
        for skip in (False, True)
    }
    assert losses[False].isnan().tolist() == [False, True, False, False, False, False]
    assert losses[True][1] == 0
    assert torch.equal(losses[True][2:], losses[False][2:])
    losses[True].sum().backward()
    assert weight.grad.isfinite()


def network(x: Tensor, timesteps: Tensor, context: Tensor, *, condition: None, clip: None) -> Tensor:
    """Stands where WanModel does: depends on x, on each sample's time and on the text."""
    return (timesteps / 1000 + context.mean((1, 2))).view(-1, 1, 1, 1, 1) * x


def test_guided_teacher_takes_a_time_for_each_sample():
    x, _, s = draw()
    text, negative = torch.randn(2, SHAPE[0], 3, 4, dtype=torch.float64)
    v = Denoiser(network=network, context=text, negative=negative, guidance=5.0)(x, s)
    with_text, without = (
        network(x, 1000 * s, given, condition=None, clip=None) for given in (text, negative)
    )
    # fp64 rounding
    torch.testing.assert_close(v, without + 5 * (with_text - without), atol=1e-12, rtol=1e-12)


def test_guidance_without_negative_is_refused():
    with pytest.raises(UserError, match=r"guidance=5\.0 needs a negative context"):
        Denoiser(network=network, context=torch.zeros(1, 3, 4), guidance=5.0)


@pytest.mark.parametrize("option", [{"jvp": "none"}, {"warmup": "linear"}])
def test_unknown_option_is_refused(option: dict[str, str]):
    with pytest.raises(UserError, match=f"{next(iter(option))}=.*choose"):
        SCMLoss(**option)
