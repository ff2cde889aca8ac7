"""What every dimension that scores videos one by one has in common."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from evaluation.records import Score, stamp
from evaluation.videos import Footage


class VideoMetric(Metric):
    """A mean over videos or over their frames.  `score` looks, `update` counts what was seen, in fp64.

    Looking and counting are apart so that a score can come from a file, another process or another run.
    Processes exchange records, not states.  version: to be raised when scores change.  weights: of its
    networks, by name in WEIGHTS; files: where they are.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    name: ClassVar[str]
    version: ClassVar[int] = 1
    least_frames: ClassVar[int] = 1
    needs_reference: ClassVar[bool] = False
    weights: ClassVar[tuple[str, ...]] = ()

    total: Tensor
    units: Tensor

    def __init__(self, files: Mapping[str, Path] | None = None) -> None:
        super().__init__(sync_on_compute=False)
        self.files = {name: (files or {})[name] for name in self.weights}
        if self.files:
            # other weights, other scores
            self.version = (type(self).version, *map(stamp, self.files.values()))
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("units", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @abstractmethod
    def score(self, footage: Footage) -> Score:
        """Look at one video; nothing is counted.  UserError if it can not be scored."""

    def update(self, score: Score) -> None:
        """Count a video."""
        self.total += score.total
        self.units += score.units

    def compute(self) -> Tensor:
        """The dimension's score, fp64; NaN of nothing."""
        return self.total / self.units


def in_parts(look: Callable[[Tensor], Tensor], frames: Tensor, most: int = 32) -> Tensor:
    """What `look` makes of frames, so many at a time, fp32: all of a long video would not fit."""
    return torch.cat([look(part).float() for part in frames.split(most)])
