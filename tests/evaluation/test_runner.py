"""Runs: whole, interrupted, shared out, and over files that are no videos."""

import os
from pathlib import Path

import pytest
import torch

from evaluation.metrics import make_metrics
from evaluation.metrics.score import VideoMetric
from evaluation.prompts import Prompt, Suite
from evaluation.records import Record, Score, line_of
from evaluation.runner import collect, plan, score_all
from evaluation.videos import Footage, find_videos

CPU = torch.device("cpu")
DIMS = ["temporal_flickering", "psnr", "ssim"]


class Witness(VideoMetric):
    """Keeps what it is shown."""

    name = "witness"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Footage] = []

    def score(self, footage: Footage) -> Score:
        self.seen.append(footage)
        return Score(0.5)


class Faulty(Witness):
    """Breaks on one video, is not finite on another."""

    name = "faulty"

    def score(self, footage: Footage) -> Score:
        if footage.video.name == "a cat-0.mp4":
            raise ZeroDivisionError("by nothing")
        return Score(float("nan") if footage.video.name == "a cat-1.mp4" else 1.0)


def run(folder: Path, out: Path, metrics: dict[str, VideoMetric], world: int = 1) -> list[Record]:
    tasks = plan(find_videos(folder, reference=folder).videos, metrics)
    for rank in range(world):
        score_all(tasks, out, CPU, rank=rank, world=world)
    return collect(tasks, out)


def test_a_video_is_decoded_once_for_all(folder: Path, tmp_path: Path) -> None:
    one, other = Witness(), Witness()
    other.name = "second"
    run(folder, tmp_path / "out", {"witness": one, "second": other})
    assert [id(each) for each in one.seen] == [id(each) for each in other.seen]
    assert [each.video.name for each in one.seen] == sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kept", [0, 1, 150, 700, 1600, 2400])
def test_a_resumed_run_is_the_uninterrupted_one(folder: Path, tmp_path: Path, kept: int) -> None:
    whole = run(folder, tmp_path / "whole", make_metrics(DIMS))
    log = (tmp_path / "whole" / "scored-0.jsonl").read_bytes()
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "scored-0.jsonl").write_bytes(log[:kept])
    assert len(log) > kept
    assert [*map(line_of, run(folder, tmp_path / "part", make_metrics(DIMS)))] == [*map(line_of, whole)]
    # nothing was scored twice
    assert sorted((tmp_path / "part" / "scored-0.jsonl").read_bytes().splitlines()) == sorted(
        log.splitlines()
    )


@pytest.mark.parametrize("world", [2, 3, 8])
def test_results_do_not_depend_on_the_number_of_ranks(folder: Path, tmp_path: Path, world: int) -> None:
    alone = run(folder, tmp_path / "one", make_metrics(DIMS))
    assert run(folder, tmp_path / "many", make_metrics(DIMS), world) == alone
    # nor do fewer ranks score again what more have scored
    witness = Witness()
    run(folder, tmp_path / "seen", {"witness": Witness()}, world)
    run(folder, tmp_path / "seen", {"witness": witness})
    assert witness.seen == []


def test_what_changed_is_scored_again(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, {"witness": Witness()})
    path = folder / "a dog-1.mp4"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    witness = Witness()
    run(folder, tmp_path, {"witness": witness})
    assert [each.video.name for each in witness.seen] == ["a dog-1.mp4"]
    other = Witness()
    other.version = 2
    run(folder, tmp_path, {"witness": other})
    assert len(other.seen) == 6


def test_what_can_not_be_scored_is_told_and_the_rest_scored(folder: Path, tmp_path: Path) -> None:
    still = folder / "a dog-0.mp4"
    (folder / "corrupt-0.mp4").write_bytes(still.read_bytes()[:300])
    (folder / "empty-0.mp4").touch()
    (folder / "text-0.mp4").write_text("not a video")
    records = run(folder, tmp_path, make_metrics(["temporal_flickering"]))
    failed = {record.video: record.failed for record in records if record.failed is not None}
    assert set(failed) == {"corrupt-0.mp4", "empty-0.mp4", "text-0.mp4"}
    assert all("can not be read as a video" in reason for reason in failed.values())
    assert sum(record.score is not None for record in records) == 6


def test_one_frame_does_for_what_needs_one(tmp_path: Path, write_lossless: object) -> None:
    (tmp_path / "in").mkdir()
    write_lossless(tmp_path / "in" / "a.mp4", torch.zeros(1, 16, 16, 3).byte())
    flickering, psnr = run(tmp_path / "in", tmp_path, make_metrics(["temporal_flickering", "psnr"]))
    assert flickering.failed == "has 1 frame; temporal_flickering needs 2"
    assert psnr.score.value == 100


def test_a_metric_that_breaks_does_not_end_the_run_and_is_tried_again(folder: Path, tmp_path: Path) -> None:
    by_name = {record.video: record for record in run(folder, tmp_path, {"faulty": Faulty()})}
    assert by_name["a cat-0.mp4"].failed.splitlines()[-1] == "ZeroDivisionError: by nothing"
    assert "Traceback" in by_name["a cat-0.mp4"].failed
    assert by_name["a cat-1.mp4"].failed == "scored nan"
    mended = Witness()
    mended.name = "faulty"
    assert all(record.score for record in run(folder, tmp_path, {"faulty": mended}))
    assert [each.video.name for each in mended.seen] == ["a cat-0.mp4", "a cat-1.mp4"]


def test_dimensions_of_vbench_look_at_their_own_prompts(folder: Path) -> None:
    prompts = (
        Prompt("a cat", "a cat", dimensions=frozenset({"temporal_flickering"})),
        Prompt("a dog", "a dog", dimensions=frozenset({"color"})),
        Prompt("3-2 on the board", "3-2", dimensions=None),
    )
    found = find_videos(folder, Suite(prompts, sha256=""))
    looks = {
        task.video.prompt.name: [metric.name for metric in task.metrics.values()]
        for task in plan(found.videos, make_metrics(["temporal_flickering", "small_world"]))
    }
    assert looks == {
        "a cat": ["temporal_flickering", "small_world"],
        "a dog": ["small_world"],
        "3-2 on the board": ["temporal_flickering", "small_world"],
    }
