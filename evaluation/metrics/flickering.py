"""VBench's temporal flickering."""

from itertools import pairwise

import torch

from evaluation.metrics.score import VideoMetric
from evaluation.records import Score
from evaluation.videos import Footage


class TemporalFlickering(VideoMetric):
    """1 - mean |x_t - x_{t+1}| / 255 over neighbouring frames, pixels and channels: 1 is still.

    Motion counts as flicker, so the leaderboard looks at videos only that a filter found static.  Sums are of
    integers, hence exact; upstream's are fp32.
    """

    name = "temporal_flickering"
    least_frames = 2

    def score(self, footage: Footage) -> Score:
        frames = footage.pixels
        # a pair at a time: all differences of a long video would not fit
        sums = [(one.short() - other.short()).abs().sum(dtype=torch.int64) for one, other in pairwise(frames)]
        return Score(1 - float(torch.stack(sums).sum()) / (255 * frames[1:].numel()))
