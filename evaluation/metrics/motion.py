"""What moves: VBench's dynamic degree, motion smoothness and temporal flickering, and which videos are static
enough for that."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from evaluation.backbones.amt import STEP, load_amt
from evaluation.backbones.correlation import LEAST
from evaluation.backbones.pixels import extended, planes
from evaluation.backbones.raft import load_raft
from evaluation.metrics.score import VideoMetric
from evaluation.records import Score
from evaluation.videos import Footage
from turbodiffusion.errors import UserError

Flow = Callable[[Tensor, Tensor], Tensor]  # from one frame to another, as Raft and Amt take them


def _checked(frames: Tensor) -> Tensor:
    """(F, H, W, 3), if they are large enough."""
    height, width = frames.shape[1:3]
    if min(height, width) < LEAST:
        raise UserError(f"is {height} x {width}, and motion is measured from {LEAST} x {LEAST} on")
    return frames


def _speed(flow: Flow, one: Tensor, other: Tensor, share: float) -> float:
    """Mean pixels that the fastest share of a frame (H, W, 3) uint8 moves until the other."""
    frames = (extended(planes(frame[None]), 8)[0] for frame in (one, other))
    speed = flow(*frames).norm(dim=1).flatten()
    return float(speed.topk(int(share * len(speed))).values.mean())


def is_dynamic(flow: Flow, frames: Tensor, fps: float) -> bool:
    """Whether enough pairs of frames (F, H, W, 3) uint8, about 8 a second, move fast."""
    frames = _checked(frames)[:: max(1, round(fps / 8))]
    limit, needed, fast = 6 * min(frames.shape[1:3]) / 256, round(4 * len(frames) / 16), 0
    for one, other in pairwise(frames):
        fast += _speed(flow, one, other, 0.05) > limit
        # asked after a pair, as upstream does: of two frames, which need none, any do
        if fast >= needed:
            return True
    return False


def is_static(flow: Flow, frames: Tensor) -> bool:
    """Whether about an eighth of neighbouring frames at most move fast, and the ends differ little."""
    limit, most, fast = 3 * min(_checked(frames).shape[1:3]) / 256, round(2 * len(frames) / 16), 0
    for one, other in pairwise(frames):
        fast += _speed(flow, one, other, 0.02) > limit
        if fast > most:
            return False
    first, last = frames[0], frames[-1]
    return all(_speed(flow, *ends, 0.02) <= limit * most * 2 for ends in ((first, last), (last, first)))


def smoothness(between: Flow, frames: Tensor) -> float:
    """1 - mean |x - y| / 255 of every other frame x and what is made of those around it, y."""
    errors = []
    for i in range(0, len(_checked(frames)) - 2, 2):
        ends, inside = extended(planes(frames[i : i + 3 : 2]) / 255, STEP)
        guess = between(*ends.split(1)).clamp(0, 1)[inside]
        # cut off, not rounded, as upstream
        error = (255 * guess).byte().int() - planes(frames[i + 1 : i + 2]).int()
        errors.append(error.abs().double().mean())
    return 1 - float(torch.stack(errors).mean()) / 255


class DynamicDegree(VideoMetric):
    """Share of videos that are dynamic in the eyes of RAFT."""

    name = "dynamic_degree"
    weights = ("raft",)

    def score(self, footage: Footage) -> Score:
        network = load_raft(self.files["raft"], footage.pixels.device)
        return Score(float(is_dynamic(network, footage.pixels, footage.fps)))


class MotionSmoothness(VideoMetric):
    """How well AMT-S foretells every other frame from its neighbours."""

    name = "motion_smoothness"
    least_frames = 3
    weights = ("amt_s",)

    def score(self, footage: Footage) -> Score:
        return Score(smoothness(load_amt(self.files["amt_s"], footage.pixels.device), footage.pixels))


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
