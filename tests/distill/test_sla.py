"""Tuning for sparse-linear attention: the loss against its definition, and what it leaves alone."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor, nn

from distill.conditioning import Example
from distill.objective import unwatched
from distill.recipes import Hardware
from distill.sla import STAIRS, Alignment, SLAFinetune
from distill.times import LogNormal
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel

SIZES = {"dim": 32, "ffn_dim": 48, "heads": 2, "layers": 2, "in_channels": 4, "out_channels": 4}
SIZES |= {"text_dim": 12, "text_length": 8, "freq_dim": 16}
# of 24 tokens: six blocks of keys, of which one
SLA = {"name": "sla", "ratio": 0.2, "block_q": 8, "block_k": 4}
ALIGNMENT = Alignment(LogNormal(1.5, 1.6), guidance=1.0)
NEGATIVE = torch.randn(1, 3, 12, generator=Generator().manual_seed(7))


def pair(ratio: float = SLA["ratio"]) -> tuple[WanModel, WanModel]:
    """A frozen dense teacher of random weights, and the sparse student that it becomes."""
    torch.manual_seed(0)
    teacher = WanModel(**SIZES)
    for weight in teacher.parameters():
        nn.init.normal_(weight, std=0.2)
    student = deepcopy(teacher)
    student.set_attention(SLA | {"ratio": ratio})
    return teacher.requires_grad_(False), student


def batch() -> Example:
    rng = Generator().manual_seed(3)
    return Example(torch.randn(2, 4, 3, 4, 8, generator=rng), torch.randn(2, 5, 12, generator=rng))


def finetune(method: Alignment = ALIGNMENT, ratio: float = SLA["ratio"]) -> SLAFinetune:
    teacher, student = pair(ratio)
    return SLAFinetune(method, student, teacher, NEGATIVE)


def losses(
    objective: SLAFinetune, step: int = 0, example: Example | None = None
) -> Iterator[tuple[str, Tensor]]:
    return objective.losses(example or batch(), step, Generator().manual_seed(1), unwatched)


def loss(objective: SLAFinetune, step: int = 0, example: Example | None = None) -> Tensor:
    ((name, value),) = losses(objective, step, example)
    assert name == "velocity"
    return value


def test_loss_is_the_mean_squared_difference_of_the_velocities():
    objective, example = finetune(), batch()
    got = loss(objective)
    rng = Generator().manual_seed(1)
    noise = torch.randn(example.latents.shape, generator=rng)
    s = ALIGNMENT.times(2, rng)
    x = torch.stack(
        [(1 - s_i) * a + s_i * b for s_i, a, b in zip(s, example.latents.double(), noise, strict=True)]
    )
    velocities = [network(x, 1000 * s, example.context) for network in (objective.student, objective.teacher)]
    wanted = torch.stack([(a - b).square().mean() for a, b in zip(*velocities, strict=True)])
    # fp32 sums of networks
    torch.testing.assert_close(got.float(), wanted, rtol=1e-5, atol=0)
    assert wanted.min() > 1e-4


def test_every_block_and_no_projection_leave_nothing_to_learn():
    objective = finetune(ratio=1.0)
    value = loss(objective)
    value.mean().backward()
    sparse = finetune()
    other = loss(sparse)
    other.mean().backward()
    # fp32 rounding, squared
    assert value.max() < 1e-9 * other.min()
    norms = [
        nn.utils.get_total_norm([p.grad for p in each.student.parameters()]).item()
        for each in (objective, sparse)
    ]
    # fp32 rounding
    assert norms[0] < 1e-4 * norms[1]


def test_gradients_reach_the_student_alone():
    objective = finetune()
    loss(objective).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.student.parameters())
    assert all(p.grad is None for p in objective.teacher.parameters())


def test_a_student_learns_what_it_can_not_see():
    objective = finetune()
    optimizer = torch.optim.Adam(objective.student.parameters(), lr=3e-3)
    values = []
    for _ in range(60):
        value = loss(objective).mean()  # the same noise and times every time
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.1 * values[0]


def test_ratio_falls_by_stairs_of_one_factor():
    ramp = replace(ALIGNMENT, ramp_steps=60)
    ratios = [ramp.ratio(step, 0.1) for step in range(62)]
    assert (ratios[0], ratios[60], ratios[61]) == (1.0, 0.1, 0.1)
    assert sorted(set(ratios), reverse=True) == pytest.approx(
        [0.1 ** (i / STAIRS) for i in range(STAIRS + 1)]
    )
    assert ratios == sorted(ratios, reverse=True)
    assert [ALIGNMENT.ratio(step, 0.3) for step in (0, 5)] == [0.3, 0.3]


def test_the_ramp_holds_while_a_loss_is_differentiated_and_not_outside():
    objective = finetune(replace(ALIGNMENT, ramp_steps=60))
    cores = [block.self_attn.core for block in objective.student.blocks]
    for step, ratio in ((0, 1.0), (36, 0.2**0.6), (60, 0.2)):
        for _ in losses(objective, step):
            assert [core.config["ratio"] for core in cores] == [ratio] * 2
        assert [core.config["ratio"] for core in cores] == [0.2] * 2
    assert objective.student.config["attention"]["ratio"] == 0.2
    # the first stair is the teacher itself: fp32 rounding, squared
    assert loss(objective, 0).max() < 1e-9 * loss(objective, 60).min()


def test_a_share_of_steps_trains_the_negative_prompt():
    method = replace(ALIGNMENT, empty_share=0.1)
    steps = [step for step in range(100) if method.is_empty(step)]
    assert steps == list(range(9, 100, 10))
    objective = finetune(method)
    empty = replace(batch(), context=NEGATIVE.expand(2, 3, 12))
    assert torch.equal(loss(objective, 9), loss(objective, 8, empty))
    assert not torch.equal(loss(objective, 9), loss(objective, 8))
    assert not any(ALIGNMENT.is_empty(step) for step in range(100))


@pytest.mark.parametrize("remat", ["none", "block"])
def test_every_role_computes_in_the_same_types(remat: str):
    """What a difference of types would add to the loss is no fault of attention."""
    objective = finetune()
    hardware = Hardware(torch.device("cpu"), torch.bfloat16, None, remat=remat)
    seen: dict[str, dict[str, set[torch.dtype]]] = {"student": {}, "teacher": {}}
    for role, network in (("student", objective.student), ("teacher", objective.teacher)):
        hardware.prepare(network, WanModel.is_fp32, network.shard_units())
        for name, module in network.named_modules():
            if not list(module.children()) and ".core" not in name:
                types = seen[role].setdefault(name, set())
                module.register_forward_hook(
                    lambda _, given, out, types=types: types.update((given[0].dtype, out.dtype))
                )
    value = loss(objective)
    value.mean().backward()
    assert value.dtype == torch.float64
    assert seen["student"] == seen["teacher"]
    feed_forward = [types for name, types in seen["student"].items() if ".ffn." in name]
    assert feed_forward == [{torch.bfloat16}] * 6
    for name, weight in objective.student.named_parameters():
        assert weight.dtype == (torch.float32 if WanModel.is_fp32(name) else torch.bfloat16)
        assert weight.grad.isfinite().all()


def test_what_can_not_be_trained_is_refused():
    teacher, _ = pair()
    with pytest.raises(UserError, match="attention=dense: there is nothing to align"):
        ALIGNMENT.build(teacher, teacher, None, None)
    with pytest.raises(UserError, match=r"empty_share=0.1 needs negative="):
        replace(ALIGNMENT, empty_share=0.1).build(*reversed(pair()), None, None)
    with pytest.raises(UserError, match="prompts alone"):
        next(losses(finetune(), example=replace(batch(), has_clips=False)))
    with pytest.raises(UserError, match="empty_share=2"):
        replace(ALIGNMENT, empty_share=2)
