"""Normal distributions again: the objective as a whole, on networks that are closed forms."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from distill.conditioning import Example
from distill.dcm import DCMLoss
from distill.objective import unwatched
from distill.rcm import RCM, Consistency, Matching, Method
from distill.rectified_flow import add_noise, expand, predict_x0
from distill.scm import SCMLoss
from distill.times import DiscreteTimes, FixedRollout, LogNormal, RandomRollout, UniformShift
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel

MEAN, SCALE = 0.3, 0.5
SHAPE = (8, 2, 1, 2, 3)
CONTEXT = torch.zeros(SHAPE[0], 1, 1)


class Network(nn.Module):
    """Stands where WanModel does; weight is 1 and lets gradients be seen."""

    def __init__(self, mean: float = MEAN, scale: float = SCALE):
        super().__init__()
        self.mean, self.scale = mean, scale
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.calls: list[tuple[Tensor, bool]] = []  # time, whether a graph was built

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, *, condition: None, clip: None
    ) -> Tensor:
        self.calls.append((timesteps.detach() / 1000, torch.is_grad_enabled()))
        return self.weight * self.velocity(x, expand(timesteps / 1000, x)) + context.mean((1, 2))[0]


class Teacher(Network):
    """E[noise - x0 | x] for x0 of N(mean, scale^2)."""

    def velocity(self, x: Tensor, s: Tensor) -> Tensor:
        variance = (1 - s) ** 2 * self.scale**2 + s**2
        return (s - (1 - s) * self.scale**2) / variance * (x - (1 - s) * self.mean) - self.mean


class Student(Network):
    """Leads each state to its end of the probability flow of N(mean, scale^2)."""

    def velocity(self, x: Tensor, s: Tensor) -> Tensor:
        spread = ((1 - s) ** 2 * self.scale**2 + s**2).sqrt()
        return (x - self.mean - self.scale / spread * (x - (1 - s) * self.mean)) / s


def consistency(warmup: int = 0) -> Consistency:
    return Consistency(SCMLoss(warmup_steps=warmup), LogNormal(0.7, 1.6))


def matching(every: int = 5, **options: object) -> Matching:
    times = UniformShift(5.0)
    return Matching(times, RandomRollout(times), student_every=every, **options)


def method(warmup: int = 0, every: int = 5) -> Method:
    return Method(consistency(warmup), matching(every), guidance=1.0)


def batch(count: int = SHAPE[0]) -> Example:
    rng = torch.Generator().manual_seed(0)
    latents = MEAN + SCALE * torch.randn(count, *SHAPE[1:], generator=rng, dtype=torch.float64)
    return Example(latents, CONTEXT[:1].expand(count, 1, 1))


def losses(rcm: RCM, step: int, example: Example | None = None) -> Iterator[tuple[str, Tensor]]:
    return rcm.losses(example or batch(), step, torch.Generator().manual_seed(step), unwatched)


# turns and steps of each rollout, as the schedule's formulas give them
TABLES = {
    (0, 5): "S1C1C2C3C4 S2C1C2C3C4 S3C1C2C3C4 S4C1C2C3C4 S1C1C2C3C4 S2C1C2C3C4 S3C1C2C3C4 S4C1C2C3C4",
    (1000, 5): "S1C1C2C3C4 S2C1C2C3C4 S3C1C2C3C4 S4C1C2C3C4 S1C1C2C3C4 S2C1C2C3C4 S3C1C2C3C4 S4C1C2C3C4",
    (0, 10): "S1C1C2C3C4C1C2C3C4C1 S2C2C3C4C1C2C3C4C1C2 S3C3C4C1C2C3C4C1C2C3 S4C4C1C2C3C4C1C2C3C4",
}


@pytest.mark.parametrize(("warmup", "every"), TABLES)
def test_turns_and_rollouts_follow_the_schedule(warmup: int, every: int):
    schedule = method(warmup, every)
    steps = range(warmup, warmup + 40)
    got = [f"{'CS'[schedule.is_student_turn(i)]}{schedule.rollout_steps(i)}" for i in steps]
    assert got == [TABLES[warmup, every].replace(" ", "")[i : i + 2] for i in range(0, 80, 2)]


def test_warmup_is_consistency_alone():
    rcm = RCM(method(warmup=3), Student(), Teacher(), Teacher())
    named = [[name for name, _ in losses(rcm, step)] for step in range(10)]
    both = ["consistency", "matching"]
    assert named == [["consistency"]] * 3 + [both] + [["critic"]] * 4 + [both, ["critic"]]
    assert [rcm.turn(step) for step in range(5)] == ["student"] * 4 + ["critic"]


def test_exact_student_has_zero_loss_and_a_wrong_one_has_not():
    exact = RCM(method(), Student(), Teacher(), Teacher())
    for _, loss in losses(exact, 0, batch(200)):
        # fp64 rounding, up to 1 / s of it in the student; the critic knows what the exact student makes
        assert loss.max() / 100 < 1e-20
    for student in (Teacher(), Student(scale=1.2 * SCALE), Student(mean=MEAN + 0.1)):
        (_, consistent), (_, _) = losses(replace(exact, student=student), 0, batch(200))
        assert consistent.mean() / 100 > 0.1


def test_critic_of_a_wrong_student_moves_it():
    rcm = RCM(method(), Student(mean=MEAN + 0.1), Teacher(), Teacher(mean=MEAN + 0.1))
    named = dict(losses(rcm, 0))
    # the gap of the means, over times
    assert named["matching"].mean() > 0.1


def test_student_is_data_at_time_zero_and_the_teacher_at_the_start():
    rcm = RCM(method(), Teacher(), Teacher(), Teacher())
    example, zero = batch(), torch.zeros(SHAPE[0], dtype=torch.float64)
    student, teacher = rcm.view(rcm.student, example), rcm.guided(example)
    assert torch.equal(predict_x0(student, example.latents, zero), example.latents)
    for s in torch.rand(5, SHAPE[0], dtype=torch.float64):
        assert torch.equal(predict_x0(student, example.latents, s), predict_x0(teacher, example.latents, s))


def test_each_turn_moves_its_own_network_through_the_last_call_alone():
    rcm = RCM(method(every=2), Student(), Teacher(), Teacher())
    for step in range(12):
        for network in (rcm.student, rcm.teacher, rcm.critic):
            network.weight.grad = None
        for name, loss in losses(rcm, step):
            for network in (rcm.student, rcm.teacher, rcm.critic):
                network.calls.clear()
            loss.sum().backward()
            assert name in ("consistency", "matching", "critic")
        moved = {"student": rcm.student.weight.grad is not None, "critic": rcm.critic.weight.grad is not None}
        assert moved == {role: role == rcm.turn(step) for role in ("student", "critic")}
        assert rcm.teacher.weight.grad is None


def test_only_the_last_step_of_a_rollout_builds_a_graph():
    rcm = RCM(Method(None, matching(every=2), guidance=1.0), Student(), Teacher(), Teacher())
    for step in range(8):
        rcm.student.calls.clear()
        list(losses(rcm, step))
        graphs = [has_graph for _, has_graph in rcm.student.calls]
        expected = [False] * len(graphs)
        expected[-1] = rcm.turn(step) == "student"
        assert graphs == expected
        assert len(graphs) == rcm.method.rollout_steps(step)


def test_expert_starts_from_noisy_clips_and_stays_in_its_interval():
    times = UniformShift(5.0, high=0.9)
    expert = Method(
        Consistency(SCMLoss(), LogNormal(1.5, 1.6, high=0.9)),
        Matching(times, RandomRollout(times, start=0.9)),
        guidance=1.0,
    )
    seen, student = [], Student()
    student.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    rcm = RCM(replace(expert, consistency=None), student, Teacher(), Teacher())
    list(losses(rcm, 0))
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(SHAPE, generator=rng)
    start = torch.full((SHAPE[0],), 0.9, dtype=torch.float64)
    assert torch.equal(seen[0], add_noise(batch().latents, noise, start))
    rcm = replace(rcm, method=expert)
    for step in range(40):
        list(losses(rcm, step))
    asked = [network.calls for network in (rcm.student, rcm.teacher, rcm.critic)]
    # times pass through thousandths and back: one rounding
    assert max(float(time.max()) for calls in asked for time, _ in calls) <= 0.9 + 1e-15


def test_guidance_uses_the_negative_embedding():
    example, s = batch(), torch.full((SHAPE[0],), 0.5, dtype=torch.float64)
    rcm = RCM(replace(method(), guidance=5.0), Student(), Teacher(), Teacher(), negative=torch.ones(1, 1, 1))
    plain = rcm.view(rcm.teacher, example)(example.latents, s)
    # contexts are added: 0 for the prompt and 1 for the negative
    assert torch.allclose(rcm.guided(example)(example.latents, s), plain - 4, rtol=0, atol=1e-12)


def test_health_is_watched_with_its_times():
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    rcm = RCM(method(every=2), Student(mean=0.0), Teacher(), Teacher())
    for step in range(2):
        generator = torch.Generator().manual_seed(0)
        watch = lambda name, values, s: seen.update({name: (values, s)})  # noqa: E731
        list(rcm.losses(batch(), step, generator, watch))
    assert set(seen) == {
        "scm/g", "scm/drift", "scm/gap", "scm/cosine", "dmd/delta", "dmd/scale", "critic/loss",
    }  # fmt: skip
    for values, s in seen.values():
        assert values.shape == s.shape == (SHAPE[0],)
        assert values.isfinite().all()


FINITE = SCMLoss(jvp="finite_difference")
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "guidance": (lambda: RCM(replace(method(), guidance=5.0), Student(), Teacher(), Teacher()), "negative="),
    "nothing": (lambda: Method(None, None), "nothing is left"),
    "no consistency": (lambda: replace(consistency(warmup=10), weight=0.0), "consistency=null"),
    "no matching": (lambda: matching(weight=0.0), "matching=null"),
    "truncated": (lambda: replace(method(), timesteps="truncate"), "timesteps=truncate"),
    "unknown rule": (lambda: replace(method(), timesteps="whole"), "timesteps=whole"),
    "rounded difference": (
        lambda: Method(Consistency(FINITE, LogNormal(0.7, 1.6)), None, timesteps="bfloat16"),
        "finite_difference",
    ),
    "low precision": (
        lambda: RCM(
            Method(Consistency(FINITE, LogNormal(0.7, 1.6)), None, guidance=1.0),
            Student().bfloat16(),
            Teacher(),
        ),
        "precision=float32",
    ),
    "always the student": (lambda: matching(every=1), "student_every=1"),
    "no simulation": (lambda: matching(steps=()), "at least one"),
    "fixed times": (lambda: Matching(UniformShift(5.0), FixedRollout(), steps=(1, 5)), "5 steps"),
    "times of dcm": (lambda: Consistency(DCMLoss(), LogNormal(0.7, 1.6)), "DiscreteTimes"),
    "times of scm": (lambda: Consistency(SCMLoss(), DiscreteTimes()), "DiscreteTimes"),
    "prompts": (
        lambda: list(
            losses(RCM(method(), Student(), Teacher(), Teacher()), 0, replace(batch(), has_clips=False))
        ),
        "dmd",
    ),
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_work_is_refused(make: Callable[[], object], said: str):
    with pytest.raises(UserError, match=said):
        make()


def test_prompts_alone_are_enough_for_matching():
    rcm = RCM(Method(None, matching(), guidance=1.0), Student(), Teacher(), Teacher())
    prompts = replace(batch(), latents=torch.zeros(SHAPE), has_clips=False)
    assert [name for step in (0, 1) for name, _ in losses(rcm, step, prompts)] == ["matching", "critic"]


def build_wan(dtype: torch.dtype) -> WanModel:
    model = WanModel(
        dim=32, ffn_dim=48, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=8, text_length=6
    )
    nn.init.normal_(model.head.head.weight, std=0.1)
    for name, parameter in model.named_parameters():
        if not WanModel.is_fp32(name):
            parameter.data = parameter.data.to(dtype)
    return model


def test_every_role_computes_in_the_same_precision():
    """Times arrive in fp64, feed-forwards run in bf16, modulation in fp32, for all alike; losses in fp64."""
    roles = {role: build_wan(torch.bfloat16) for role in ("student", "teacher", "critic")}
    seen: dict[str, set[tuple[torch.dtype, ...]]] = {}

    def note(name: str, *dtypes: torch.dtype) -> None:
        seen.setdefault(name, set()).add(dtypes)

    for role, model in roles.items():
        model.register_forward_pre_hook(
            lambda module, args, role=role: note(f"{role} x and time", args[0].dtype, args[1].dtype)
        )
        for layer in model.blocks[0].ffn:
            layer.register_forward_hook(
                lambda module, args, out, role=role: note(f"{role} ffn", args[0].dtype, out.dtype)
            )
        model.blocks[0].register_forward_pre_hook(
            lambda module, args, role=role: note(
                f"{role} tokens and modulation", *(a.dtype for a in args[:2])
            )
        )
    rcm = RCM(replace(method(every=2), guidance=5.0), *roles.values(), negative=torch.randn(1, 3, 8))
    example = Example(torch.randn(2, 4, 2, 4, 4).bfloat16(), torch.randn(2, 5, 8))
    for step in range(2):
        for _, loss in losses(rcm, step, example):
            note("loss", loss.dtype)
            loss.sum().backward()
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    each = {"x and time": (fp64, fp64), "ffn": (bf16, bf16), "tokens and modulation": (bf16, fp32)}
    assert seen == {f"{r} {what}": {d} for r in roles for what, d in each.items()} | {"loss": {(fp64,)}}
    assert all(p.grad.isfinite().all() for p in roles["student"].parameters())
    assert all(p.grad is None for p in roles["teacher"].parameters())
