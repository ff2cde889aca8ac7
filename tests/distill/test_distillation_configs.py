"""The experiments of distillation, against the numbers that rCM was published with."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from distill.dcm import DCMLoss
from distill.rcm import Method
from distill.scm import SCMLoss
from distill.sla import Alignment
from distill.times import FixedRollout, LogNormal, RandomRollout, UniformShift

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
Tree = dict[str, object]

# reference: rCM's experiments wan2pt1_{1pt3B,14B}_res480p_t2v_rCM at NVlabs/rcm, 2026-05-17
PUBLISHED = {
    "rcm_wan1_3b": {
        "consistency.weight": 100.0,
        "consistency.loss.offset": 0.1,
        "consistency.loss.warmup_steps": 1000,
        "consistency.times": LogNormal(0.7, 1.6),
        "matching.weight": 1.0,
        "matching.times": UniformShift(5.0),
        "matching.rollout": RandomRollout(UniformShift(5.0)),
        "matching.student_every": 5,
        "matching.steps": [1, 2, 3, 4],
        "guidance": 5.0,
        "optims.default": (2e-6, (0.0, 0.999), 0.01, 100, "constant"),
        "optims.critic": (4e-7, (0.0, 0.999), 0.01, 100, "constant"),
        "sigma_max": 80,
        "run": (100_000, 1, 1, 0, 50, 500, 500),
        "frames": 20,
        "ema": 0.1,
        "clip": float("inf"),
        "shown": 5,
    },
}
PUBLISHED["rcm_wan14b"] = PUBLISHED["rcm_wan1_3b"] | {
    "consistency.loss.warmup_steps": 0,
    "consistency.times": LogNormal(1.5, 1.6),
    "matching.student_every": 10,
    "optims.default": (1e-6, (0.0, 0.999), 0.01, 100, "constant"),
    "optims.critic": (1e-7, (0.0, 0.999), 0.01, 100, "constant"),
    "sigma_max": 200,
    "run": (100_000, 1, 1, 0, 50, 250, 250),
    "frames": 21,
}

# reference: the experiments wan2pt1_{1pt3B,14B}_res480p_t2v_SLA at thu-ml/TurboDiffusion, 2026-07-16
TUNED = {
    "sla_wan1_3b": {
        "attention": {"name": "sla", "ratio": 0.1, "block_q": 64, "block_k": 64, "feature_map": "softmax"},
        "objective": Alignment(LogNormal(1.5, 1.6), guidance=5.0),
        "trainable": "all",
        "optims.default": (1e-5, (0.9, 0.999), 0.01, 100, "constant"),
        "sigma_max": 80,
        "run": (100_000, 4, 1, 0, 50, 500, 500),
        "frames": 21,
        "ema": 0.1,
        "clip": float("inf"),
        "shown": 5,
    },
}
TUNED["sla_wan14b"] = TUNED["sla_wan1_3b"] | {"run": (100_000, 1, 32, 0, 50, 250, 250)}


def composed(experiment: str, *overrides: str) -> Tree:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", [f"experiment={experiment}", *overrides])
    return OmegaConf.to_container(cfg, resolve=True)


def method(tree: Tree) -> Method:
    return instantiate(tree["recipe"]["objective"])


def machinery(tree: Tree) -> Tree:
    """What is not the objective's."""
    plan = instantiate(tree["plan"])
    got: Tree = {
        f"optims.{role}": (o["lr"], tuple(o["betas"]), o["weight_decay"], o["warmup"], o["decay"])
        for role, o in tree["optims"].items()
    }
    return got | {
        "sigma_max": tree["recipe"]["outcome"]["sigma_max"],
        "run": (
            plan.steps, tree["batch"], plan.accumulate, plan.seed,
            plan.log_every, plan.preview_every, plan.save_every,
        ),
        "frames": tree["data"]["frames"],
        "ema": plan.ema_width,
        "clip": plan.max_grad_norm,
        "shown": tree["recipe"]["source"]["shown"],
    }  # fmt: skip


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_defaults_are_the_published_ones(experiment: str):
    tree = composed(experiment)
    objective = method(tree)
    got = machinery(tree) | {"guidance": objective.guidance}
    for name in PUBLISHED[experiment].keys() - got.keys():
        node: object = objective
        for part in name.split("."):
            node = getattr(node, part)
        got[name] = node
    assert got == PUBLISHED[experiment]
    assert isinstance(objective.consistency.loss, SCMLoss)
    assert (objective.consistency.loss.warmup, objective.timesteps) == ("code", "float")


@pytest.mark.parametrize("experiment", TUNED)
def test_defaults_of_tuning_are_the_published_ones(experiment: str):
    tree = composed(experiment)
    got = machinery(tree) | {name: tree["recipe"][name] for name in ("attention", "trainable")}
    del got["optims.critic"]  # there is none
    assert got | {"objective": method(tree)} == TUNED[experiment]


@pytest.mark.parametrize(("dense", "sizes"), [("rcm_tiny", (0.1, 8, 8)), ("rcm_wan1_3b", (0.1, 64, 64))])
def test_a_sparse_student_is_distilled_as_a_dense_one(dense: str, sizes: tuple[float, int, int]):
    sparse = dense.replace("rcm", "rcm_sla")
    ours, theirs = composed(sparse), composed(dense)
    attention = ours.pop("attention")
    assert ours["recipe"].pop("attention") == attention
    assert (attention["ratio"], attention["block_q"], attention["block_k"]) == sizes
    assert ours["recipe"]["outcome"].pop("file") == ours.pop("name") == sparse
    del theirs["name"], theirs["recipe"]["outcome"]["file"]
    assert ours == theirs


def test_attention_is_chosen_by_name_and_a_wrong_one_names_the_choices():
    assert composed("rcm_sla_tiny", "attention=dense")["recipe"]["attention"] == {"name": "dense"}
    with pytest.raises(HydraException, match=r"Available options in 'attention':\s+dense\s+sla\s+sla_tiny"):
        composed("sla_tiny", "attention=foo")


@pytest.mark.parametrize("preset", ["scm", "dcm", "dmd"])
def test_presets_differ_from_rcm_by_the_objective_alone(preset: str):
    trees = [composed(f"{name}_tiny") for name in ("rcm", preset)]
    objectives = []
    for tree in trees:
        objectives.append(tree["recipe"].pop("objective"))
        del tree["name"], tree["recipe"]["outcome"]["file"]
    assert trees[0] == trees[1]
    ours, theirs = objectives
    halves = {"scm": ("matching",), "dcm": ("matching", "consistency"), "dmd": ("consistency",)}[preset]
    assert [name for name in theirs if ours[name] != theirs[name]] == [n for n in theirs if n in halves]
    assert theirs[halves[0]] is None


def test_experts_divide_the_noise_between_them():
    high, low = (method(composed(f"rcm_wan2_2_i2v_{name}")) for name in ("high", "low"))
    for part in ("consistency", "matching"):
        ends = [(getattr(m, part).times.low, getattr(m, part).times.high) for m in (high, low)]
        assert ends == [(0.9, 1.0), (0.0, 0.9)]
    assert [m.matching.rollout.start for m in (high, low)] == [1.0, 0.9]
    assert [m.matching.rollout.times == m.matching.times for m in (high, low)] == [True, True]
    assert high.guidance == low.guidance == 3.5


def test_size_follows_the_device():
    small, full = composed("rcm_tiny"), composed("rcm_tiny", "device=cuda")
    assert (small["device"], small["precision"], full["precision"]) == ("cpu", "float32", "bfloat16")
    for name in ("steps", "batch", "clips"):
        assert full[name] > 10 * small[name]
    assert composed("rcm_tiny", "device=cuda:1")["steps"] == full["steps"]
    assert composed("rcm_tiny", "device=cuda", "steps=7")["steps"] == 7


def test_rollout_at_fixed_times_and_rcm_in_discrete_time_are_one_override_away():
    fixed = "objective/matching/rollout@recipe.objective.matching.rollout=fixed"
    discrete = "objective/consistency@recipe.objective.consistency=dcm"
    chosen = method(composed("rcm_tiny", fixed, discrete))
    assert isinstance(chosen.matching.rollout, FixedRollout)
    assert isinstance(chosen.consistency.loss, DCMLoss)
