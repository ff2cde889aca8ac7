"""`python -m evaluation`, from the command line to its files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.__main__ import Options, evaluate
from evaluation.vbench import T2V
from tests.evaluation.conftest import ExitCode

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = ("results.json", "records.jsonl", "report.md", "report.html", "eval_results.json")


@pytest.fixture
def call(exit_code: ExitCode) -> Callable[..., int]:
    return lambda *words: exit_code(Options, evaluate, *words, "device=cpu")


def test_a_folder_is_scored(folder: Path, tmp_path: Path, call: Callable[..., int]) -> None:
    (folder / "notes.txt").touch()
    words = f"videos={folder}", f"reference={folder}", "dims=[temporal_flickering,psnr]"
    assert call(*words, f"out={tmp_path / 'one'}") == 0
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    values = [
        json.loads(line)["score"]["total"]
        for line in (tmp_path / "one" / "records.jsonl").read_text().splitlines()
        if "temporal_flickering" in line
    ]
    flickering = results["dimensions"]["temporal_flickering"]
    # the order of fp64 sums
    assert flickering["raw"] == pytest.approx(sum(values) / 6, abs=1e-15)
    assert flickering["normalised"] == pytest.approx((flickering["raw"] - 0.6293) / (1 - 0.6293), abs=1e-12)
    assert flickering["interval"][0] <= flickering["raw"] <= flickering["interval"][1]
    assert (flickering["prompts"], flickering["videos"], flickering["failed"]) == (3, 6, 0)
    assert results["dimensions"]["psnr"]["raw"] == 100
    # no prompts of the leaderboard, no totals
    assert results["totals"] is None
    assert list(results["left_out"]) == ["notes.txt"]
    report = (tmp_path / "one" / "report.md").read_text()
    assert "notes.txt is no video" in report
    assert "not only at those that a filter found static" in report
    assert json.loads((tmp_path / "one" / "run.json").read_text())["options"]["dims"] == [
        *("temporal_flickering", "psnr")
    ]


def test_a_suite_has_partial_means_and_no_total(
    folder: Path, tmp_path: Path, call: Callable[..., int]
) -> None:
    info = [{"prompt_en": name, "dimension": ["temporal_flickering"]} for name in ("a cat", "a dog")]
    (tmp_path / "info.json").write_text(json.dumps(info))
    words = f"videos={folder}", "dims=[temporal_flickering]", f"prompts={tmp_path / 'info.json'}"
    assert call(*words, f"out={tmp_path / 'out'}") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["totals"]["total"] is None
    assert len(results["totals"]["missing"]) == len(T2V.dimensions) - 1
    normalised = results["dimensions"]["temporal_flickering"]["normalised"]
    assert results["totals"]["partial"] == pytest.approx({"quality": normalised}, abs=1e-15)
    # three of five samples of both prompts, and whatever else there is
    assert len(results["missing_videos"]) == 6
    assert set(results["left_out"]) == {"3-2 on the board-0.mp4", "3-2 on the board-1.mp4"}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "- no total: subject_consistency, " in report
    assert "- quality, of the dimensions that are there alone: " in report
    assert "- a cat-2.mp4" in report


def test_failures_are_shown_and_the_exit_code_tells(
    folder: Path, tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty-0.mp4").touch()
    words = f"videos={folder}", f"reference={folder}", "dims=[temporal_flickering,psnr]"
    assert call(*words, f"out={tmp_path / 'out'}") == 2
    said = capsys.readouterr()
    assert "1 of 7 videos could not be scored: see" in said.err
    assert "- empty-0.mp4 can not be read as a video" in said.out
    assert said.out.count("- empty-0.mp4") == 1
    failures = json.loads((tmp_path / "out" / "results.json").read_text())["failures"]
    assert [(each["video"], each["dimension"]) for each in failures] == [
        *(("empty-0.mp4", "temporal_flickering"), ("empty-0.mp4", "psnr"))
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("dims=[psnr]",), "psnr: give the folder of videos to compare with as reference=DIR"),
        (("dims=[beauty]",), "there is no metric beauty; choose from "),
        ((), "missing mandatory value: dims"),
        (("dims=[psnr]", "speed=3"), "Key 'speed' not in 'Options'"),
        (("dims=[psnr]", "prompts=no.txt"), "no.txt does not exist"),
    ],
)
def test_what_can_not_be_done_is_one_sentence(
    words: tuple[str, ...],
    said: str,
    folder: Path,
    tmp_path: Path,
    call: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(f"videos={folder}", f"out={tmp_path / 'out'}", *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.dist
def test_two_processes_write_what_one_does(folder: Path, tmp_path: Path) -> None:
    (folder / "empty-0.mp4").touch()
    words = (
        "-m",
        "evaluation",
        f"videos={folder}",
        f"reference={folder}",
        "dims=[temporal_flickering,ssim]",
        "device=cpu",
    )
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    for name, start in (("one", ()), ("two", torchrun)):
        ended = subprocess.run(
            [sys.executable, *start, *words, f"out={tmp_path / name / 'run'}"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "1 of 7 videos could not be scored" in ended.stderr, ended.stderr
    assert {path.name for path in (tmp_path / "two" / "run").glob("scored-*")} == {
        "scored-0.jsonl",
        "scored-1.jsonl",
    }
    for name in WRITTEN:
        one, two = (tmp_path / each / "run" / name for each in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
