"""The leaderboard's totals, against its published rows."""

import pytest
import torch

from evaluation.bootstrap import scores
from evaluation.vbench import DIMENSIONS, I2V, T2V, Board, Dimension, board_of


def raw_for(board: Board, groups: dict[str, float]) -> dict[str, float]:
    """Raw scores whose normalised values are all the same within a group."""
    return {
        name: each.low + groups[group] * (each.high - each.low)
        for group, dimensions in board.groups.items()
        for name, each in dimensions.items()
    }


def test_known_vectors() -> None:
    zero = T2V.totals(dict.fromkeys(T2V.dimensions, 0.0))
    # printed with 4 decimals, 3 for semantic
    assert zero.groups["quality"] == pytest.approx(-0.7146, abs=5e-5)
    assert zero.total == pytest.approx(-0.5717, abs=5e-5)
    assert T2V.totals(dict.fromkeys(T2V.dimensions, 1.0)).groups["semantic"] == pytest.approx(1.691, abs=5e-4)
    best = T2V.totals({name: each.high for name, each in T2V.dimensions.items()})
    # rounding of fp64
    assert [*best.groups.values(), best.total] == pytest.approx([1, 1, 1], abs=1e-12)


@pytest.mark.parametrize(
    ("quality", "semantic", "total"),
    [(84.92, 80.10, 83.956), (85.38, 80.63, 84.43), (84.26, 80.92, 83.59), (84.07, 81.85, 83.63)],
)
def test_published_rows(quality: float, semantic: float, total: float) -> None:
    raw = raw_for(T2V, {"quality": quality / 100, "semantic": semantic / 100})
    # papers print two decimals
    assert 100 * T2V.totals(raw).total == pytest.approx(total, abs=5e-3)


def test_what_a_raw_point_is_worth() -> None:
    raw = {name: torch.zeros((), dtype=torch.float64, requires_grad=True) for name in T2V.dimensions}
    T2V.totals(raw).total.backward()
    worth = {
        **{"subject_consistency": 0.1442, "background_consistency": 0.1667, "temporal_flickering": 0.3320},
        **{"motion_smoothness": 0.4222, "dynamic_degree": 0.0615, "aesthetic_quality": 0.1231},
        **{"imaging_quality": 0.1231, "scene": 0.0270, "appearance_style": 0.0781, "temporal_style": 0.0611},
        **dict.fromkeys(("object_class", "multiple_objects", "human_action", "color"), 0.0222),
        **{"spatial_relationship": 0.0222, "overall_consistency": 0.0611},
    }
    # as tabulated, to 4 decimals, the last of which is truncated or rounded
    assert {name: float(x.grad) for name, x in raw.items()} == pytest.approx(worth, abs=1e-4)


def test_image_to_video() -> None:
    perfect = raw_for(I2V, {"quality": 1.0, "i2v": 1.0})
    assert I2V.totals(perfect).total == pytest.approx(1, abs=1e-12)
    less = I2V.totals(perfect | {"camera_motion": 0.0, "dynamic_degree": 0.0})
    assert less.groups["i2v"] == pytest.approx(2 / 2.1, abs=1e-12)
    assert less.groups["quality"] == pytest.approx(5 / 5.5, abs=1e-12)
    assert less.total == pytest.approx((2 / 2.1 + 5 / 5.5) / 2, abs=1e-12)


def test_no_total_of_missing_dimensions() -> None:
    raw = raw_for(T2V, {"quality": 0.8, "semantic": 0.7})
    del raw["scene"]
    totals = T2V.totals(raw | {"psnr": 30.0})
    assert totals.total is None
    assert totals.missing == ["scene"]
    assert totals.groups == pytest.approx({"quality": 0.8}, abs=1e-12)
    assert totals.partial == pytest.approx({"semantic": 0.7}, abs=1e-12)
    assert T2V.totals({}).groups == {}


def test_order_and_clipping() -> None:
    assert [len(group) for group in T2V.groups.values()] == [7, 9]
    assert len(T2V.dimensions) == 16
    assert len(DIMENSIONS) == 19
    # above the table's maximum a score stays above 1
    assert Dimension(low=0.5, high=0.75).normalise(1.0) == 2.0


def test_prompts_of_pictures_have_a_leaderboard_of_their_own() -> None:
    assert board_of(["temporal_flickering", "dynamic_degree"]) is T2V
    assert board_of(["dynamic_degree", "i2v_subject"]) is I2V
    # one weight of VBench-I2V's three is a tenth: (0.1 x 0 + 1 + 1) / 2.1 where the camera alone is wrong
    raw = {name: each.high for name, each in I2V.dimensions.items()} | {"camera_motion": 0.0}
    tables = {name: torch.tensor([[value], [1.0]], dtype=torch.float64) for name, value in raw.items()}
    found = scores(tables, torch.ones(1, 1, dtype=torch.float64))
    assert found["i2v"].item() == pytest.approx(2 / 2.1, abs=1e-12)
    assert found["total"].item() == pytest.approx((1 + 2 / 2.1) / 2, abs=1e-12)
