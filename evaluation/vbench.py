"""VBench's leaderboard: its dimensions, and how their raw scores become totals.

Constants and formulas are those of VBench (arXiv:2311.17982) and VBench-I2V (arXiv:2411.13503) as their
leaderboard computes them.  Raw scores and totals are in [0, 1] here; the leaderboard prints them times 100.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class Dimension:
    """low, high: raw scores that become 0 and 1.  scale: of a video's value in the leaderboard's files."""

    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    scale: float = 1.0
    is_boolean: bool = False

    def normalise(self, raw: Number) -> Number:
        """Not clipped, as on the leaderboard."""
        return (raw - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Totals(Generic[Number]):
    """groups: weighted means of the complete groups.  partial: of what there is of others; no such number is
    comparable.  total: None if a dimension is missing."""

    groups: dict[str, Number]
    partial: dict[str, Number]
    total: Number | None
    missing: list[str]


@dataclass(frozen=True)
class Board:
    """Groups of dimensions, and the weight of each group in the total."""

    groups: Mapping[str, Mapping[str, Dimension]]
    weights: Mapping[str, float]

    @property
    def dimensions(self) -> dict[str, Dimension]:
        """All of them, in order."""
        return {name: each for group in self.groups.values() for name, each in group.items()}

    def totals(self, raw: Mapping[str, Number]) -> Totals[Number]:
        """From raw scores by dimension; others than this board's are ignored."""
        means, partial = {}, {}
        for group, dimensions in self.groups.items():
            there = {name: each for name, each in dimensions.items() if name in raw}
            if there:
                total = sum(each.weight * each.normalise(raw[name]) for name, each in there.items())
                place = means if len(there) == len(dimensions) else partial
                place[group] = total / sum(each.weight for each in there.values())
        missing = [name for name in self.dimensions if name not in raw]
        weighted = [weight * means[group] for group, weight in self.weights.items() if group in means]
        total = None if missing else sum(weighted) / sum(self.weights.values())
        return Totals(means, partial, total, missing)


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
_GROUPS = {
    group: {name: Dimension(**row) for name, row in _TABLE[group].items()}
    for group in ("quality", "semantic", "i2v")
}
_I2V_QUALITY = {name: each for name, each in _GROUPS["quality"].items() if name != "temporal_flickering"}

T2V = Board({name: _GROUPS[name] for name in ("quality", "semantic")}, {"quality": 4, "semantic": 1})
I2V = Board({"quality": _I2V_QUALITY, "i2v": _GROUPS["i2v"]}, {"quality": 1, "i2v": 1})
PUBLISHED: dict[str, list[float]] = _TABLE["published"]
DIMENSIONS = T2V.dimensions | I2V.dimensions
GROUPS = (*T2V.groups, "i2v", "total")  # what totals are called


def board_of(dimensions: Iterable[str]) -> Board:
    """The leaderboard that has these."""
    return T2V if _GROUPS["i2v"].keys().isdisjoint(dimensions) else I2V
