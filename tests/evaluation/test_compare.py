"""Paired differences, against what their theory says."""

import json
from pathlib import Path

import pytest
import torch

from evaluation.bootstrap import draws, interval, scores, sums
from evaluation.compare import Options, compare, report
from evaluation.export import upstream
from evaluation.records import Record, Score, line_of
from evaluation.vbench import T2V
from turbodiffusion.errors import UserError


def records(values: torch.Tensor, dimension: str = "psnr") -> list[Record]:
    """Values (prompts, samples), one video each."""
    return [
        Record(f"{dimension}{p}{s}", dimension, f"p{p}-{s}.mp4", f"p{p}", Score(float(value)))
        for p, row in enumerate(values)
        for s, value in enumerate(row)
    ]


def test_a_constant_difference_is_certain() -> None:
    values = torch.randn(30, 2, dtype=torch.float64)
    (found,) = compare(records(values), records(values + 0.25))
    # rounding of fp64 sums
    assert (found.delta, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-12)
    assert (found.prompts, found.videos) == (30, 60)


def test_the_interval_is_that_of_a_mean() -> None:
    values = torch.randn(400, 1, dtype=torch.float64)
    (found,) = compare(records(torch.zeros_like(values)), records(values))
    half = 1.96 * float(values.std()) / 400**0.5
    # ends of 2000 replicates have a deviation of 5 % of the half width
    assert (found.high - found.delta, found.delta - found.low) == pytest.approx((half, half), rel=0.15)


def test_prompts_are_drawn_not_videos() -> None:
    # five samples that repeat each other say no more than one
    values = torch.randn(50, 1, dtype=torch.float64)
    (once,) = compare(records(torch.zeros_like(values)), records(values))
    (five,) = compare(records(torch.zeros(50, 5)), records(values.expand(-1, 5)))
    assert (five.low, five.high) == pytest.approx((once.low, once.high), abs=1e-12)


def test_units_weigh() -> None:
    some = [
        Record("a", "scene", "a.mp4", "a", Score(3.0, units=4)),
        Record("b", "scene", "b.mp4", "b", Score(0.0, units=0)),
        Record("c", "scene", "c.mp4", "c", Score(0.0, units=1)),
        Record("d", "scene", "d.mp4", "d", None, "failed"),
    ]
    table = sums(some, ["a", "b", "c", "d"])
    assert scores(table, torch.ones(1, 4, dtype=torch.float64))["scene"].item() == 3 / 5
    low, high = interval(scores(table, draws(4))["scene"])
    assert 0 <= low < 3 / 5 < high <= 1


def test_totals_are_compared_where_complete() -> None:
    every = [each for name in T2V.dimensions for each in records(torch.full((4, 1), 0.5), name)]
    better = [
        each
        for name in T2V.dimensions
        for each in records(torch.full((4, 1), 0.5 + 0.1 * (name == "color")), name)
    ]
    found = {each.score: each for each in compare(every, better)}
    assert found["semantic"].delta == pytest.approx(0.1 / 9, abs=1e-7)  # 0.6 in fp32
    assert found["total"].delta == pytest.approx(0.1 / 9 / 5, abs=1e-7)
    assert found["total"].prompts == 4
    less = {each.score for each in compare(every[4:], better)}
    assert {"semantic", "color"} <= less
    assert not {"quality", "total"} & less


def test_only_what_both_scored_is_paired() -> None:
    values = torch.arange(6.0)[:, None]
    one, other = records(values)[:4], records(values + 1)[2:]
    (found,) = compare(one, other)
    assert (found.baseline, found.value, found.videos) == (2.5, 3.5, 2)
    with pytest.raises(UserError, match="no video and dimension in common"):
        compare(one[:1], other)
    renamed = [Record("x", "psnr", "p0-0.mp4", "another", Score(1.0))]
    with pytest.raises(UserError, match=r"do not agree on what p0-0\.mp4 was asked"):
        compare(one, renamed)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").write_text(
            "".join(map(line_of, records(torch.full((3, 1), float(i)))))
        )
    runs = [str(tmp_path / name) for name in "abc"]
    report(Options(runs=runs, out=str(tmp_path / "out")))
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [each["delta"] for each in written["differences"]] == [1.0, 2.0]
    assert (tmp_path / "out" / "compare.md").read_text() == capsys.readouterr().out
    with pytest.raises(UserError, match="two runs or more, got 1"):
        report(Options(runs=runs[:1]))
    with pytest.raises(UserError, match=r"has no records\.jsonl"):
        report(Options(runs=[*runs, str(tmp_path)]))


def test_a_result_file_of_upstream_compares_like_a_run(tmp_path: Path) -> None:
    ours, theirs = (records(torch.rand(4, 2, dtype=torch.float64), "imaging_quality") for _ in range(2))
    for name, found in (("ours", ours), ("theirs", theirs)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").write_text("".join(map(line_of, found)))
    content = upstream(theirs, {"imaging_quality": 0.5}, Path("/elsewhere"))
    (tmp_path / "results.json").write_text(json.dumps(content))
    for other in ("theirs", "results.json"):
        runs = [str(tmp_path / "ours"), str(tmp_path / other)]
        report(Options(runs=runs, out=str(tmp_path / f"out_{other}")))
    one, two = (
        json.loads((tmp_path / f"out_{other}" / "compare.json").read_text())["differences"][0]
        for other in ("theirs", "results.json")
    )
    assert two.pop("run") == "results.json"
    assert one.pop("run") == "theirs"
    # upstream's file has percents: rounding of fp64
    assert two == pytest.approx(one, abs=1e-12)
    assert "imaging_quality" in (tmp_path / "out_results.json" / "report.html").read_text()
