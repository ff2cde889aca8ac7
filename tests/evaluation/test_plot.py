"""Plots of the small world's tables."""

import json
from pathlib import Path

import pytest
from PIL import Image

from evaluation.plot import Options, draw, points, read
from turbodiffusion.errors import UserError


def row(model: str, sparsity: float, *scores: float) -> dict:
    return {"model": model, "steps": 50, "sparsity": sparsity, "runs": [{"all_three": s} for s in scores]}


@pytest.fixture
def tables(tmp_path: Path) -> list[str]:
    made = []
    for name, sparsity, scores in (("a", 0.9, (0.7, 0.8)), ("b", 0.8, (0.9, 0.9))):
        rows = [row("teacher", 0.0, 0.95), row("tuned", sparsity, *scores)]
        made.append(tmp_path / name / "students.json")
        made[-1].parent.mkdir()
        made[-1].write_text(json.dumps({"rows": rows}))
    return [str(path) for path in made]


def test_tables_join_into_lines_with_errors(tables: list[str]) -> None:
    rows = [row for table in tables for row in read(table)]
    lines = points(rows, Options())
    # the deviation of two is their difference over the root of two
    assert lines["tuned"] == [pytest.approx((80, 90, 0)), pytest.approx((90, 75, 10 / 2**0.5))]
    assert [x for x, *_ in points(rows, Options(x="steps"))["tuned"]] == [50, 50]


def test_over_seconds_a_point_is_a_mean_over_runs() -> None:
    seen = row("rCM", 0.0, 0.5, 0.7)
    seen["runs"] = [run | {"seconds": s} for run, s in zip(seen["runs"], (1.0, 3.0), strict=True)]
    assert points([seen], Options(x="seconds"))["rCM"] == [pytest.approx((2, 60, 20 / 2**0.5))]


def test_a_picture_is_drawn(tables: list[str], tmp_path: Path) -> None:
    draw(Options(tables=tables, dst=str(tmp_path / "plots" / "sparsity.png")))
    with Image.open(tmp_path / "plots" / "sparsity.png") as picture:
        # a line of the first colour of matplotlib's cycle is in it
        assert (31, 119, 180) in {color for _, color in picture.convert("RGB").getcolors(1 << 20)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"x": "bits"}, "x=bits: choose sparsity, steps, seconds"),
        ({"score": "beauty"}, "score=beauty: choose subject"),
        ({"tables": ["no.json"]}, "no.json is no students.json"),
    ],
)
def test_what_can_not_be_drawn_is_refused(
    options: dict, said: str, tables: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        draw(Options(**{"tables": tables, "dst": str(tmp_path / "x.png"), **options}))
    assert not (tmp_path / "x.png").exists()
