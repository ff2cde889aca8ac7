"""From checkpoint to student by the real recipe and trainer, at the smallest sizes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from distill.conditioning import Captions, Example, Material
from distill.distillation import distillation
from distill.flow_matching import TextToVelocity
from distill.objective import Parts, unwatched
from distill.optim import Optim
from distill.rcm import Method
from distill.recipes import Hardware
from distill.shard_files import Sample, write_context, write_safetensors
from distill.students import Students, _energy
from distill.trainer import Plan, Trainer
from turbodiffusion import checkpoints
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel
from turbodiffusion.variants import variant

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CPU = Hardware(torch.device("cpu"), torch.float32, None)
PRESETS = ("rcm", "scm", "dcm", "dmd", "rcm_sla")
# of the 8 tokens here: four blocks of keys, of which one
BLOCKS = ("attention.ratio=0.25", "attention.block_q=4", "attention.block_k=2")


def composed(experiment: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [f"experiment={experiment}", "debug='true'", *overrides])


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A checkpoint of random weights, with the channels of the small world's."""
    network = WanModel(dim=32, ffn_dim=48, heads=2, layers=2, in_channels=36, text_dim=128, text_length=6)
    nn.init.normal_(network.head.head.weight, std=0.1)
    path = tmp_path / "teacher.safetensors"
    sampling = replace(variant("wan_tiny").sampling, steps=4)
    checkpoints.save(path, network, sampling=sampling, variant="wan_tiny", history=[{"trained": "teacher"}])
    return path


class Noise:
    """Random examples, for a source and its data in one."""

    def batch(self, number: int, count: int = 2) -> Example:
        rng = torch.Generator().manual_seed(number)

        def draw(*shape: int) -> Tensor:
            return torch.randn(count, *shape, generator=rng)

        return Example(draw(16, 2, 4, 4), draw(5, 128), condition=draw(20, 2, 4, 4))

    def load(self, device: torch.device, dtype: torch.dtype, context: int) -> Material:
        return Material(self, [self.batch(100), self.batch(101, 1)], torch.zeros(1, 3, 128), None)


def parts(
    teacher: Path, preset: str, hardware: Hardware = CPU, *words: str, start: str | None = None
) -> Parts:
    recipe = composed(f"{preset}_tiny", *(BLOCKS if "sla" in preset else ()), *words).recipe
    return distillation(
        hardware,
        teacher=str(teacher),
        start=start,
        objective=instantiate(recipe.objective),
        source=Noise(),
        outcome=instantiate(recipe.outcome, teacher_steps=3),
        **{name: recipe[name] for name in ("attention", "trainable") if name in recipe},
    )


PLAN = Plan(steps=6, log_every=1, save_every=100, preview_every=100)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train_their_networks_and_ship_a_student(preset: str, teacher: Path, tmp_path: Path):
    made = parts(teacher, preset)
    before = {role: next(network.parameters()).clone() for role, network in made.objective.networks.items()}
    trainer = Trainer(made, optims={"default": Optim(lr=1e-3, warmup=1)}, plan=PLAN, folder=tmp_path / preset)
    trainer.fit()
    assert set(before) == {"student"} | (set() if preset in ("scm", "dcm") else {"critic"})
    for role, network in made.objective.networks.items():
        assert not torch.equal(next(network.parameters()), before[role])
    shipped = checkpoints.load_network(
        tmp_path / preset / f"{preset}_tiny.safetensors", device="cpu", dtype=torch.float32
    )
    assert (shipped.sampling.sampler, shipped.sampling.steps, shipped.sampling.guidance) == ("rcm", 4, 1.0)
    # told times as in training
    assert (shipped.sampling.timesteps, shipped.sampling.sigma_max) == ("float", 80.0)
    assert [entry["trained"] for entry in shipped.report.metadata.history] == ["teacher", preset]
    name = "sla" if preset == "rcm_sla" else "dense"
    assert shipped.network.config["attention"]["name"] == name
    networks = (made.objective.teacher, made.objective.critic)
    assert all(n is None or n.config["attention"] == {"name": "dense"} for n in networks)


def test_networks_start_as_copies_of_a_frozen_teacher(teacher: Path):
    rcm = parts(teacher, "rcm", replace(CPU, dtype=torch.bfloat16)).objective
    assert isinstance(rcm.method, Method)
    weights = dict(rcm.teacher.named_parameters())
    assert not any(weight.requires_grad for weight in weights.values())
    for network in rcm.networks.values():
        for name, weight in network.named_parameters():
            assert weight.requires_grad
            assert weight.dtype == (torch.float32 if WanModel.is_fp32(name) else torch.bfloat16)
            assert torch.equal(weight, weights[name])
            assert weight is not weights[name]


def test_a_student_can_be_trained_on(teacher: Path, tmp_path: Path):
    student = checkpoints.load_network(teacher, device="cpu", dtype=torch.float32).network
    nn.init.zeros_(student.head.head.bias)
    path = tmp_path / "student.safetensors"
    checkpoints.save(path, student, sampling=variant("wan_tiny").sampling, variant="wan_tiny")
    rcm = parts(teacher, "rcm", start=str(path)).objective
    assert torch.equal(rcm.student.head.head.bias, student.head.head.bias)
    other = WanModel(dim=16, ffn_dim=8, heads=2, layers=1, in_channels=36, text_dim=128, text_length=6)
    checkpoints.save(path, other, sampling=variant("wan_tiny").sampling, variant="wan_tiny")
    with pytest.raises(UserError, match="other sizes"):
        parts(teacher, "rcm", start=str(path))


def test_what_is_missing_is_named_before_any_work(tmp_path: Path):
    given = ["teacher=absent", f"data.path={tmp_path}", f"negative={tmp_path / 'negative.safetensors'}"]
    sample = Sample("a prompt", torch.ones(5, 16), torch.zeros(4, 2, 4, 4))
    write_safetensors(tmp_path / "shard_000000.safetensors", [(f"{i:09d}", sample) for i in range(3)])
    write_context(tmp_path / "negative.safetensors", torch.zeros(5, 16), "")
    for missing, said in (("teacher", "teacher="), ("data.path", "data.path="), ("negative", "negative=")):
        words = [word for word in given if not word.startswith(f"{missing}=")]
        with pytest.raises(UserError, match=said):
            instantiate(composed("rcm_wan1_3b", *words, "data.frames=2").recipe)(CPU)


def test_stored_clips_train_a_student(teacher: Path, tmp_path: Path):
    shard, negative = tmp_path / "shard_000000.safetensors", tmp_path / "negative.safetensors"
    sample = Sample("a prompt", torch.ones(5, 128), torch.zeros(16, 2, 4, 4), torch.zeros(20, 2, 4, 4))
    write_safetensors(shard, [(f"{i:09d}", sample) for i in range(3)])
    write_context(negative, torch.zeros(5, 128), "")
    given = [f"teacher={teacher}", f"data.path={tmp_path}", f"negative={negative}", "data.frames=2"]
    cfg = composed("rcm_wan2_2_i2v_low", *given)
    made = instantiate(cfg.recipe)(CPU)
    trainer = Trainer(made, optims={"default": Optim(lr=1e-3)}, plan=PLAN, folder=tmp_path / "run")
    trainer.fit()
    assert (tmp_path / "run" / "rcm_wan2_2_i2v_low.safetensors").is_file()


def test_energy_score_of_normal_numbers_is_the_closed_form():
    truth, *pair = torch.randn(3, 20000, 1, generator=torch.Generator().manual_seed(0)).unbind()
    # E|x - y| = 2 / sqrt(pi) of two of them and sqrt(2 / pi) of one and their mean; 4 standard errors
    assert _energy((pair[0], pair[1]), truth) == pytest.approx(math.pi**-0.5, abs=0.03)
    mean = torch.zeros_like(truth)
    assert _energy((mean, mean), truth) == pytest.approx((2 / math.pi) ** 0.5, abs=0.03)


def test_measures_compare_student_and_teacher_at_few_steps(teacher: Path):
    outcome = parts(teacher, "scm").outcome
    assert isinstance(outcome, Students)
    measures = outcome.measure({"student": outcome.objective.student})
    whos = ("energy/student", "energy/untrained", "mse/student")
    names = {f"{who}_{n}" for who in whos for n in (1, 2, 4)}
    assert set(measures) == names | {f"energy/teacher_{n}" for n in (1, 2, 3, 4)}
    (first, other), example = outcome._teacher[3], outcome.material.shown[0]
    # against itself: half of the mean distance of two clips of one prompt
    spread = (first - other).flatten(1).norm(dim=1).mean().item() / example.latents[0].numel() ** 0.5
    assert measures["energy/teacher_3"] == pytest.approx(spread / 2, rel=1e-12)
    # before any training the student is the untrained one
    assert measures["energy/student_4"] == measures["energy/untrained_4"]
    assert f"score {measures['energy/student_4']:.3f}" in outcome.verdict(measures)
    assert "does not beat" in outcome.verdict(measures)


def test_one_step_along_a_straight_path_is_the_teachers_clip(teacher: Path):
    outcome = parts(teacher, "scm").outcome
    objective = outcome.objective
    bias = torch.randn(64)
    for network in (objective.teacher, objective.student):
        with torch.no_grad():
            network.head.head.weight.zero_()
            network.head.head.bias.copy_(bias)
    outcome = replace(outcome, objective=replace(objective, method=replace(objective.method, guidance=1.0)))
    measures = outcome.measure({"student": objective.student})
    # fp64 rounding, squared
    assert measures["mse/student_1"] < 1e-24
    assert measures["energy/student_1"] == pytest.approx(measures["energy/teacher_3"], rel=1e-12)


def test_alignment_ships_a_sparse_network_that_is_sampled_like_its_teacher(teacher: Path, tmp_path: Path):
    made = parts(teacher, "sla")
    before = made.outcome.measure(made.objective.networks)
    assert before["mse/student"] == before["mse/untrained"] > 0
    Trainer(made, optims={"default": Optim(lr=1e-3, warmup=1)}, plan=PLAN, folder=tmp_path / "sla").fit()
    shipped = checkpoints.load_network(
        tmp_path / "sla" / "sla_tiny.safetensors", device="cpu", dtype=torch.float32
    )
    attention = {"name": "sla", "ratio": 0.25, "block_q": 4, "block_k": 2, "feature_map": "softmax"}
    assert shipped.network.config["attention"] == attention
    assert made.objective.teacher.config["attention"] == {"name": "dense"}
    assert (shipped.sampling.sampler, shipped.sampling.guidance) == ("unipc", 2.5)
    after = made.outcome.measure({"student": shipped.network})
    assert after["mse/untrained"] == before["mse/untrained"]
    assert after["mse/student"] != before["mse/student"]
    assert f"{after['mse/student']:.4f}, and" in made.outcome.verdict(after)


@pytest.mark.parametrize("trainable", ["all", "proj_only", "no_proj"])
def test_what_is_trainable_moves_and_nothing_else(trainable: str, teacher: Path, tmp_path: Path):
    made = parts(teacher, "sla", CPU, f"trainable={trainable}")
    before = {name: weight.clone() for name, weight in made.objective.student.state_dict().items()}
    Trainer(made, optims={"default": Optim(lr=1e-3, warmup=1)}, plan=PLAN, folder=tmp_path / "run").fit()
    after = made.objective.student.state_dict()
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    projections = {name for name in before if ".proj_l." in name}
    assert len(projections) == 4
    wanted = {"all": set(before), "proj_only": projections, "no_proj": set(before) - projections}[trainable]
    assert moved <= wanted
    assert moved >= {name for name in wanted if "self_attn" in name and "weight" in name}


def test_a_tuned_teacher_is_distilled_on_with_the_attention_it_has(teacher: Path, tmp_path: Path):
    tuned = checkpoints.load_network(teacher, device="cpu", dtype=torch.float32).network
    tuned.set_attention({"name": "sla", "block_q": 4, "block_k": 2})
    nn.init.normal_(tuned.blocks[0].self_attn.core.proj_l.weight)
    path = tmp_path / "tuned.safetensors"
    checkpoints.save(path, tuned, sampling=variant("wan_tiny").sampling, variant="wan_tiny")
    for preset, ratio in (("rcm", 0.1), ("rcm_sla", 0.25)):
        student = parts(teacher, preset, start=str(path)).objective.student
        assert (
            student.config["attention"]["ratio"] == student.blocks[0].self_attn.core.config["ratio"] == ratio
        )
        assert torch.equal(
            student.blocks[0].self_attn.core.proj_l.weight, tuned.blocks[0].self_attn.core.proj_l.weight
        )


def test_wrong_attention_is_refused(teacher: Path):
    for words, said in (
        (["attention.feature_map=hedgehog"], "softmax, elu, relu"),
        (["trainable=some"], "trainable=some: choose all, proj_only, no_proj"),
    ):
        with pytest.raises(UserError, match=said):
            parts(teacher, "sla", CPU, *words)


def test_small_world_shows_a_share_of_first_frames(make_student, make_clips):
    student: TextToVelocity = make_student()
    clips = make_clips(student.text_encoder, count=400)
    data = Captions(clips, student.text_encoder, image_share=0.7, seed=0)
    example = data.batch(3)
    shown = example.condition.flatten(1).any(1)
    # 4 standard errors of a share of 400
    assert shown.float().mean().item() == pytest.approx(0.7, abs=4 * (0.7 * 0.3 / 400) ** 0.5)
    assert torch.equal(data.batch(3).condition, example.condition)
    batch = clips.batch(3)
    torch.testing.assert_close(example.context, student.context(batch.tokens).detach())
    assert not example.context.requires_grad
    assert not Captions(clips, student.text_encoder, image_share=0.0, seed=0).batch(0).condition.any()


@pytest.mark.parametrize("preset", PRESETS)
def test_bfloat16_networks_get_finite_gradients(preset: str, teacher: Path):
    made = parts(teacher, preset, replace(CPU, dtype=torch.bfloat16))
    rng = torch.Generator().manual_seed(0)
    for step in (0, 2, 3):  # warm-up, then both halves, then the critic
        role = made.objective.turn(step)
        for _, loss in made.objective.losses(made.data.batch(step), step, rng, unwatched):
            loss.mean().backward()
        grads = [p.grad for p in made.objective.networks[role].parameters() if p.grad is not None]
        assert grads
        assert all(grad.isfinite().all() for grad in grads)
