"""The leaderboard's files, there and back."""

import json
import zipfile
from pathlib import Path

import pytest

from evaluation.export import Options, pack, read_upstream, upstream
from evaluation.records import Record, Score
from evaluation.vbench import DIMENSIONS, T2V
from turbodiffusion.errors import UserError

EXTRAS = {"background_consistency": {"video_sim": 2.0, "cnt_per_video": 3}}


def records() -> list[Record]:
    return [
        Record(f"{name}{i}", name, f"a cat-{i}.mp4", "a cat", Score(float(i), extras=EXTRAS.get(name, {})))
        for name in T2V.dimensions
        for i in range(2)
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run without a blemish."""
    raw = dict.fromkeys(T2V.dimensions, 0.5)
    (tmp_path / "results.json").write_text('{"notes": []}')
    (tmp_path / "eval_results.json").write_text(json.dumps(upstream(records(), raw, Path("/videos"))))
    return tmp_path


def test_the_form_of_a_result(run: Path) -> None:
    written = json.loads((run / "eval_results.json").read_text())
    assert list(written) == list(T2V.dimensions)
    assert written["imaging_quality"] == [
        0.5,
        [{"video_path": f"/videos/a cat-{i}.mp4", "video_results": 100.0 * i} for i in range(2)],
    ]
    for name in ("dynamic_degree", "human_action"):
        assert [each["video_results"] for each in written[name][1]] == [False, True]
    assert written["background_consistency"][1][0].items() >= EXTRAS["background_consistency"].items()
    uncounted = [
        Record("k", "color", "a.mp4", "a", Score(0.0, units=0)),
        Record("l", "psnr", "a", "a", Score(1.0)),
    ]
    assert upstream(uncounted, {"color": 0.5, "psnr": 1.0}, Path()) == {"color": [0.5, []]}


def test_there_and_back(run: Path, tmp_path: Path) -> None:
    read = read_upstream(run / "eval_results.json")
    scored = {(each.dimension, each.video): (each.prompt, each.score.value) for each in read}
    assert scored == {(name, f"a cat-{i}.mp4"): ("a cat", i) for name in T2V.dimensions for i in range(2)}
    pack(Options([str(run)], str(tmp_path / "s.zip")))
    assert read_upstream(tmp_path / "s.zip") == read
    # as the leaderboard's scorer does: every JSON in the zip, a dimension's first number
    with zipfile.ZipFile(tmp_path / "s.zip") as file:
        merged = {
            name: value[0] for each in file.namelist() for name, value in json.loads(file.read(each)).items()
        }
    norm = {
        name: (merged[name] - each.low) / (each.high - each.low)
        for name, each in DIMENSIONS.items()
        if name in merged
    }
    quality = (
        sum(norm[name] * (0.5 if name == "dynamic_degree" else 1) for name in T2V.groups["quality"]) / 6.5
    )
    semantic = sum(norm[name] for name in T2V.groups["semantic"]) / 9
    total = T2V.totals(dict.fromkeys(T2V.dimensions, 0.5)).total
    assert total == pytest.approx(0.8 * quality + 0.2 * semantic, rel=1e-12)  # order of fp64 sums


def test_a_submission_may_come_in_parts(tmp_path: Path) -> None:
    videos = [{"video_path": "x/a cat-0.mp4", "video_results": 0.25}]
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as file:
        file.writestr("folder/a.json", json.dumps({"color": [0.25, videos]}))
        file.writestr("b.json", json.dumps({"camera_motion": [0.75, videos, {"pan": 1.0}]}))
    assert [each.dimension for each in read_upstream(tmp_path / "s.zip")] == ["color", "camera_motion"]


@pytest.mark.parametrize("content", ["", "[]", '{"beauty": [1, []]}', '{"color": 1}', '{"color": [1, [{}]]}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    for name in ("a.json", "a.zip", "missing.json"):
        if name != "missing.json":
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=f"{name} holds no results of VBench"):
            read_upstream(tmp_path / name)


def test_all_that_keeps_a_run_from_being_submitted_is_told(run: Path, tmp_path: Path) -> None:
    content = json.loads((run / "eval_results.json").read_text())
    del content["scene"]
    content["color"][1][0]["video_results"] = 7.0
    (run / "eval_results.json").write_text(json.dumps(content))
    (run / "results.json").write_text('{"notes": ["3 videos are missing"]}')
    with pytest.raises(UserError, match=r"3 videos are missing; scene is missing; color has the value 7\.0"):
        pack(Options([str(run)], str(tmp_path / "s.zip")))
    assert not (tmp_path / "s.zip").exists()
    with pytest.raises(UserError, match="is no finished run"):
        pack(Options([str(tmp_path / "nothing")], str(tmp_path / "s.zip")))
