"""Ablations: what is planned, and a queue of real commands."""

import os
import sys
import time
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from PIL import Image
from rich.console import Console

from tools.ablate import TABLES, Options, Plan, gather, read
from tools.jobs import Job, Queue
from turbodiffusion.errors import UserError
from turbodiffusion.variants import CONFIGS


def queue(folder: Path, *, gpus: int = 0, each: int = 2) -> Queue:
    return Queue(folder / "logs", gpus, each, Console(file=(folder / "said.txt").open("w")))


def jobs(**said: tuple[str, str]) -> dict[str, Job]:
    """name=(Python, names of what it needs)."""
    return {
        name: Job(name, (sys.executable, "-c", code), frozenset(needs.split()))
        for name, (code, needs) in said.items()
    }


def test_jobs_wait_for_what_they_need_and_are_not_run_again(tmp_path: Path) -> None:
    note = f"open({str(tmp_path / 'order')!r}, 'a').write"
    made = jobs(
        last=(f"{note}('c')", "first second"), first=(f"{note}('a')", ""), second=(f"{note}('b')", "")
    )
    assert queue(tmp_path).run(made) == []
    order = (tmp_path / "order").read_text()
    assert sorted(order) == ["a", "b", "c"]
    assert order[-1] == "c"
    made |= jobs(second=(f"{note}('B')", ""))
    assert queue(tmp_path).run(made) == []
    assert (tmp_path / "order").read_text() == order + "B"


def test_a_failure_is_told_and_stops_only_what_needs_it(tmp_path: Path) -> None:
    made = jobs(bad=("raise SystemExit('no such thing')", ""), lost=("", "bad"), fine=("", ""))
    said = queue(tmp_path).run(made)
    assert said == [f"bad ended with 1: no such thing ({tmp_path / 'logs' / 'bad.log'})", "lost lacks bad"]
    assert (tmp_path / "logs" / "fine.done").exists()
    assert not (tmp_path / "logs" / "bad.done").exists()


def test_every_gpu_has_its_share(tmp_path: Path) -> None:
    code = f"""
import os, time
open({str(tmp_path)!r} + "/%s", "w").write(os.environ["CUDA_VISIBLE_DEVICES"])
time.sleep(2)
"""
    assert queue(tmp_path, gpus=2, each=2).run(jobs(**{name: (code % name, "") for name in "abcd"})) == []
    assert sorted((tmp_path / name).read_text() for name in "abcd") == ["0", "0", "1", "1"]


def test_ctrl_c_reaches_what_runs_and_is_waited_for(tmp_path: Path) -> None:
    # the second job stands for the user: it interrupts the queue that runs it
    saving = f"""
import time
try:
    open({str(tmp_path / "ready")!r}, "w").close()
    time.sleep(60)
except KeyboardInterrupt:
    open({str(tmp_path / "saved")!r}, "w").close()
"""
    user = f"""
import os, signal, time
while not os.path.exists({str(tmp_path / "ready")!r}):
    time.sleep(0.05)
os.kill({os.getpid()}, signal.SIGINT)
"""
    started = time.time()
    with pytest.raises(KeyboardInterrupt):
        queue(tmp_path).run(jobs(saving=(saving, ""), user=(user, "")))
    assert (tmp_path / "saved").exists()
    assert time.time() - started < 30
    assert not (tmp_path / "logs" / "saving.done").exists()


@pytest.mark.parametrize(
    "file", sorted(TABLES.glob("*/*.yaml")), ids=lambda file: f"{file.parent.name}-{file.stem}"
)
def test_every_plan_trains_what_it_scores(file: Path, tmp_path: Path) -> None:
    options = Options(
        table=file.stem,
        scale=file.parent.name,
        dst=str(tmp_path),
        train="device=cuda",
        teacher="t.safetensors",
    )
    plan = read(options)
    made = plan.jobs(options)
    assert all(job.needs <= made.keys() for job in made.values())
    used = frozenset().union(*(job.needs for job in made.values()))
    ends = {f"{file.stem}_{name}" for name in plan.plots} | ({f"compare_{file.stem}"} if plan.runs else set())
    assert made.keys() - used == ends
    assert ends
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for name in plan.train:
            config = compose("train", list(made[f"{name}_0"].words[2:]))
            # the file that it ships is the one that others read
            assert config.recipe.outcome.file == config.name == plan.file(name, 0).stem


def test_methods_are_compared_at_equal_turns_of_the_student() -> None:
    turns = {}
    options = Options(table="methods", train="device=cuda")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for name, job in read(options).jobs(options).items():
            if name.endswith("_0"):
                config = compose("train", list(job.words[2:]))
                parts = config.recipe.objective
                warmup = config.tangent_warmup if name == "rcm_0" else 0
                late = config.steps - warmup
                turns[name] = warmup + (late // config.student_every if parts.matching else late)
    assert turns.keys() == {"rcm_0", "dmd_0", "scm_0", "dcm_0"}
    assert len(set(turns.values())) == 1, turns


def test_a_file_of_another_run_is_named_and_waited_for(tmp_path: Path) -> None:
    said = """
train: {a: {words: experiment=x}, b: {words: "experiment=y recipe.start={a}", seeds: 2}}
scores: {all: {rows: {A: a, B: b, other: some.safetensors}}}
make: {small: {tool: quantize, words: "src={b} format=fp8", seeds: 2}}
runs: {teacher: {ckpt: "{teacher}"}, B: {ckpt: "{small}", steps: [1, 2]}}
"""
    plan = Plan(tmp_path / "with space", **yaml.safe_load(said))
    options = Options(
        table="t", train="steps=3", score="count=8", run="dims=[x]", teacher="/t.pth", launch="-m launcher"
    )
    made = plan.jobs(options)
    assert f"recipe.start={plan.folder}/a_1/a_1.safetensors" in made["b_1"].words
    assert made["b_1"].needs == {"a_1"}
    assert made["score_all"].needs == {"a_0", "b_0", "b_1"}
    (listed,) = [word for word in made["score_all"].words if word.startswith("ckpts=")]
    assert made["a_0"].words[1:3] == ("-m", "launcher")
    assert {"tools.quantize", f"src={plan.folder}/b_1/b_1.safetensors"} < set(made["small_1"].words)
    assert {"ckpt=/t.pth", "dims=[x]", "evaluation=vbench_quality", f"out={plan.folder}/teacher"} < set(
        made["run_teacher"].words
    )
    assert {f"ckpt={plan.file('small', 0)}", "steps=2", f"out={plan.folder}/B 2"} < set(made["run_B 2"].words)
    assert f"runs=[{plan.folder}/teacher,{plan.folder}/B 1,{plan.folder}/B 2]" in made["compare_t"].words
    with pytest.raises(UserError, match="pass its file as teacher="):
        plan.jobs(Options(table="t"))
    files = [str(plan.file(*run)) for run in (("a", 0), ("b", 0), ("b", 1))]
    assert listed == f"ckpts=[A:{files[0]},B:{files[1]},{files[2]},other:some.safetensors]"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"table": "beauty"}, "choose scale=tiny table=all"),
        ({"scale": "huge"}, "no table=methods at scale=huge"),
    ],
)
def test_what_is_not_planned_is_refused(options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(Options(**{"table": "methods", **options}))


def test_tables_are_gathered_into_one_document(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "steps_quality.png")
    (tmp_path / "quant.md").write_text("# quant\n\n`command`\n\n## part\n\n| a |\n")
    (tmp_path / "steps.md").write_text("# steps\n\n`command`\n\n![quality](steps_quality.png)\n")
    (tmp_path / "notes.md").write_text("no table")
    gather(tmp_path, tmp_path / "docs" / "ablations.md")
    lines = (tmp_path / "docs" / "ablations.md").read_text().split("\n")
    assert [line for line in lines if line.startswith("#")] == [
        "# Ablations",
        "## quant",
        "### part",
        "## steps",
    ]
    assert (tmp_path / "docs" / "steps_quality.png").exists()
    assert "no table" not in lines
