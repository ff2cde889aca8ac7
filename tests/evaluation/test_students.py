"""The table of students: a copy of the teacher must score like the teacher."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from evaluation import students
from evaluation.oracle import Reading
from evaluation.small_world import load_models
from evaluation.students import Answers, Questions, Row, Scores, groups, load_students, score
from tests.evaluation.conftest import ExitCode
from turbodiffusion.checkpoints import load_network, save
from turbodiffusion.models.int8 import Int8Linear
from turbodiffusion.models.wan import WanModel
from turbodiffusion.pipelines.generate import Encoded
from turbodiffusion.variants import variants

ROOT = Path(__file__).resolve().parents[2]
TEACHER = "assets/wan_tiny.safetensors"
TINY = (
    "teacher_steps=1",
    "steps=[1]",
    "count=1",
    "seeds=2",
    "diversity_prompts=1",
    "device=cpu",
    "dtype=float32",
)


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def call(exit_code: ExitCode) -> Callable[..., int]:
    return partial(exit_code, students.Options, students.report)


def test_a_copy_of_the_teacher_scores_as_the_teacher(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(f"ckpts=[copy:{TEACHER},{TEACHER}]", f"dst={tmp_path / 'out'}", *TINY, "steps=[1,2]") == 0
    table = (tmp_path / "out" / "students.md").read_text()
    assert capsys.readouterr().out == table
    written = json.loads((tmp_path / "out" / "students.json").read_text())
    assert written["options"]["count"] == 1
    teacher, other, more, copy, copy_more = written["rows"]
    assert [(row["model"], row["steps"]) for row in written["rows"]] == [
        ("teacher", 1),
        ("teacher, other noise", 1),
        ("teacher", 2),  # at one step it is above
        ("copy", 1),
        ("copy", 2),
    ]
    assert len(copy["runs"]) == 2
    untimed = [{**run, "seconds": 0} for run in (*more["runs"], *copy_more["runs"])]
    assert untimed == 3 * untimed[:1]
    for scores in (*teacher["runs"], *copy["runs"]):
        assert (scores["latent_mse"], scores["diversity"], scores["distance"]) == (0, 1, None)
        assert scores["background"] == teacher["runs"][0]["background"]
    assert other["runs"][0]["latent_mse"] > 0.01  # of latents of variance 1 or so
    assert other["runs"][0]["diversity"] != 1
    assert len(table.splitlines()) == 7
    assert "1.000 ± 0.000" in table.splitlines()[-2]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["ckpts=[none.safetensors]"], "none.safetensors does not exist"),
        ([f"ckpts=[{TEACHER}]", "seeds=1"], "got seeds=1"),
        ([f"ckpts=[{TEACHER}]", "diversity_prompts=2"], "diversity_prompts=2"),
        (["ckpts=[{tmp}/wan.safetensors]"], "wan.safetensors has in_channels 16 but its teacher has 36"),
        ([f"ckpts=[{TEACHER}]", "color=red"], "color"),
        ([], "ckpts"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: list[str],
    part: str,
    call: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = WanModel(dim=128, ffn_dim=64, heads=1, layers=1)
    variant = "wan2.1_t2v_1.3b"
    save(tmp_path / "wan.safetensors", network, variant=variant, sampling=variants()[variant].sampling)
    words = [word.replace("{tmp}", str(tmp_path)) for word in words]
    assert call(f"dst={tmp_path / 'out'}", *TINY, *words) == 2
    out, said = capsys.readouterr()
    assert not out
    assert part in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_share_of_blocks_is_kept_by_tuned_and_by_dense_students(tmp_path: Path) -> None:
    teacher = load_network(TEACHER, device="cpu", dtype=torch.float32).network
    tuned = tmp_path / "tuned.safetensors"
    blocks = {"name": "sla", "block_q": 64, "block_k": 8}
    save(tuned, WanModel(**{**teacher.config, "attention": blocks}), variant="wan_tiny")
    options = students.Options(ckpts=[TEACHER, str(tuned)], ratio=0.25, device="cpu", dtype="float32")
    found = [loaded for group in load_students(options, teacher).values() for loaded in group]
    for loaded, (block_q, block_k) in zip(found, ((8, 8), (64, 8)), strict=True):
        core = loaded.network.blocks[0].self_attn.core
        assert (core.config["ratio"], core.config["block_q"], core.config["block_k"]) == (
            0.25,
            block_q,
            block_k,
        )
    assert teacher.config["attention"] == {"name": "dense"}


@pytest.mark.parametrize(("quant", "is_int8"), [("auto", False), ("int8", True)])
def test_networks_are_judged_in_8_bits_if_asked(quant: str, is_int8: bool) -> None:
    options = students.Options(ckpts=[TEACHER], quant=quant, device="cpu", dtype="float32")
    teacher = load_models(options, TEACHER)[0].network
    (student,) = load_students(options, teacher)[TEACHER]
    for network in (teacher, student.network):
        assert any(isinstance(module, Int8Linear) for module in network.modules()) == is_int8


def test_a_name_begins_a_group_that_the_files_after_it_join() -> None:
    words = ["x/a", "y/a", "rcm:b", "c", "dmd:d", "rcm:e"]
    assert groups(words) == {"x/a": ["x/a"], "y/a": ["y/a"], "rcm": ["b", "c", "e"], "dmd": ["d"]}


def test_several_training_seeds_give_mean_and_deviation() -> None:
    runs = [Scores(0.5, 0.5, 0.5, 0.5, 1.0, diversity, 0.0, 0.0) for diversity in (0.8, 0.9, 1.0)]
    line = Row("rcm", 4, 8 / 9, ["a", "b", "c"], runs).line()
    assert "| rcm | 4 | 89 | 50.0 ± 0.0 |" in line
    assert "| 0.900 ± 0.100 |" in line


def test_distance_and_diversity_are_taken_over_the_right_clips() -> None:
    count, prompts, seeds = 97, 3, 4  # one more than the distance has features
    rows = torch.cat((torch.arange(count), torch.arange(prompts).repeat_interleave(seeds)))
    encoded = Encoded(shape=(16, 3, 4, 4), context=torch.zeros(count, 1, 1), negative=None)
    questions = Questions(encoded, torch.zeros(count, 3).long(), rows, list(range(len(rows))))
    readings = [Reading(0, 0, None, 1.0, 1.0, 0.0)] * count
    teachers = Answers(torch.randn(len(rows), 16, 3, 4, 4), readings, 1.0)
    # asked once: brighter by 1 / sqrt(48), in 48 means; asked several times: twice as wide
    brighter, wider = teachers.latents[:count] + 48**-0.5, 2 * teachers.latents[count:]
    result = score(Answers(torch.cat((brighter, wider)), readings, 1.0), teachers, questions)
    assert (result.subject, result.motion, result.background, result.all_three) == (1, 1, 0, 0)
    # fp32's sums
    assert result.distance == pytest.approx(1, rel=1e-5)
    assert result.diversity == pytest.approx(2)
    assert result.latent_mse == pytest.approx(1 / 48)
