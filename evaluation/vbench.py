"""VBench's leaderboard: its dimensions, and how their raw scores become totals.

Constants and formulas are those of VBench (arXiv:2311.17982) and VBench-I2V (arXiv:2411.13503) as their
leaderboard computes them.  Raw scores and totals are in [0, 1] here; the leaderboard prints them times 100.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
        return Totals(
            means, partial, None if missing else sum(weighted) / sum(self.weights.values()), missing
        )


_QUALITY = {
    "subject_consistency": Dimension(low=0.1462),
    "background_consistency": Dimension(low=0.2615),
    "temporal_flickering": Dimension(low=0.6293),
    "motion_smoothness": Dimension(low=0.706, high=0.9975),
    "dynamic_degree": Dimension(weight=0.5, is_boolean=True),
    "aesthetic_quality": Dimension(),
    "imaging_quality": Dimension(scale=100),
}
_SEMANTIC = {
    "object_class": Dimension(),
    "multiple_objects": Dimension(),
    "human_action": Dimension(is_boolean=True),
    "color": Dimension(),
    "spatial_relationship": Dimension(),
    "scene": Dimension(high=0.8222),
    "appearance_style": Dimension(low=0.0009, high=0.2855),
    "temporal_style": Dimension(high=0.364),
    "overall_consistency": Dimension(high=0.364),
}
_FROM_IMAGE = {
    "i2v_subject": Dimension(low=0.1462),
    "i2v_background": Dimension(low=0.2615),
    "camera_motion": Dimension(weight=0.1),
}

T2V = Board({"quality": _QUALITY, "semantic": _SEMANTIC}, {"quality": 4, "semantic": 1})
I2V = Board(
    {
        "quality": {name: each for name, each in _QUALITY.items() if name != "temporal_flickering"},
        "i2v": _FROM_IMAGE,
    },
    {"quality": 1, "i2v": 1},
)
DIMENSIONS = T2V.dimensions | I2V.dimensions
GROUPS = (*T2V.groups, "i2v", "total")  # what totals are called


def board_of(dimensions: Iterable[str]) -> Board:
    """The leaderboard that has these."""
    return T2V if _FROM_IMAGE.keys().isdisjoint(dimensions) else I2V


# quality, semantic and total of published rows, times 100; steps, 50 of them guided.  The same checkpoint
# spans more than a point between papers, whose prompts, seeds and cards differ.
PUBLISHED = {
    "Wan2.1 1.3B, 50 steps (arXiv:2503.20314)": (84.92, 80.10, 83.96),
    "Wan2.1 1.3B, 50 steps (arXiv:2510.08431)": (83.95, 79.26, 83.02),
    "Wan2.1 1.3B, 50 steps (arXiv:2505.13389)": (83.71, 77.98, 82.56),
    "DMD2 1.3B, 4 steps (arXiv:2510.08431)": (85.58, 80.50, 84.56),
    "rCM 1.3B, 4 steps (arXiv:2510.08431)": (85.38, 80.63, 84.43),
    "rCM 1.3B, 2 steps (arXiv:2510.08431)": (84.90, 80.86, 84.09),
    "rCM 1.3B, 1 step (arXiv:2510.08431)": (83.60, 78.82, 82.65),
    "Wan2.1 14B, 50 steps (arXiv:2510.08431)": (84.26, 80.92, 83.58),
    "rCM 14B, 4 steps (arXiv:2510.08431)": (85.43, 82.88, 84.92),
}
