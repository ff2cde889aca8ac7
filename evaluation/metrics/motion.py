"""VBench's dynamic degree and motion smoothness, and which videos are static enough for its flickering."""

from itertools import pairwise

import torch
from torch import Tensor

from evaluation.backbones.amt import STEP, load_amt
from evaluation.backbones.correlation import LEAST
from evaluation.backbones.pixels import extended, planes
from evaluation.backbones.raft import Raft, load_raft
from evaluation.metrics.score import VideoMetric
from evaluation.records import Score
from evaluation.videos import Footage
from turbodiffusion.errors import UserError


def _checked(footage: Footage) -> Tensor:
    """Its frames, if they are large enough."""
    height, width = footage.pixels.shape[1:3]
    if min(height, width) < LEAST:
        raise UserError(f"is {height} x {width}, and motion is measured from {LEAST} x {LEAST} on")
    return footage.pixels


def fastest(network: Raft, one: Tensor, other: Tensor, share: float) -> float:
    """Mean pixels that the fastest share of a frame (H, W, 3) uint8 moves until the other."""
    frames = (extended(planes(frame[None]), 8)[0] for frame in (one, other))
    speed = network(*frames).norm(dim=1).flatten()
    return float(speed.topk(int(share * len(speed))).values.mean())


def needed(frames: int) -> int:
    """Pairs of so many frames that must move for a video to be dynamic."""
    return round(4 * frames / 16)


class DynamicDegree(VideoMetric):
    """Share of videos in which enough pairs of frames, about 8 a second, move fast."""

    name = "dynamic_degree"
    weights = ("raft",)

    def score(self, footage: Footage) -> Score:
        network = load_raft(self.files["raft"], footage.pixels.device)
        frames = _checked(footage)[:: max(1, round(footage.fps / 8))]
        limit, fast, is_dynamic = 6 * min(frames.shape[1:3]) / 256, 0, False
        for one, other in pairwise(frames):
            fast += fastest(network, one, other, 0.05) > limit
            # asked after a pair, as upstream does: of two frames, which need none, any do
            if is_dynamic := fast >= needed(len(frames)):
                break
        return Score(float(is_dynamic))


class MotionSmoothness(VideoMetric):
    """1 - mean |x - y| / 255 of every other frame x and what AMT-S makes of those around it, y."""

    name = "motion_smoothness"
    least_frames = 3
    weights = ("amt_s",)

    def score(self, footage: Footage) -> Score:
        network, frames = load_amt(self.files["amt_s"], footage.pixels.device), _checked(footage)
        errors = []
        for i in range(0, len(frames) - 2, 2):
            ends, inside = extended(planes(frames[i : i + 3 : 2]) / 255, STEP)
            guess = network(*ends.split(1)).clamp(0, 1)[inside]
            # cut off, not rounded, as upstream
            error = (255 * guess).byte().int() - planes(frames[i + 1 : i + 2]).int()
            errors.append(error.abs().double().mean())
        return Score(1 - float(torch.stack(errors).mean()) / 255)


def is_static(network: Raft, footage: Footage) -> bool:
    """Whether about an eighth of neighbouring frames at most move fast, and the ends differ little."""
    pixels = _checked(footage)
    limit, most = 3 * min(pixels.shape[1:3]) / 256, round(2 * len(pixels) / 16)
    fast = 0
    for one, other in pairwise(pixels):
        fast += fastest(network, one, other, 0.02) > limit
        if fast > most:
            return False
    first, last = pixels[0], pixels[-1]
    return all(fastest(network, *ends, 0.02) <= limit * most * 2 for ends in ((first, last), (last, first)))
