"""VBench's dynamic degree, and which videos are static enough for its temporal flickering."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor

from evaluation.backbones.pixels import planes
from evaluation.backbones.raft import LEAST, Raft, load_raft
from evaluation.metrics.score import VideoMetric
from evaluation.records import Score
from evaluation.videos import Footage
from turbodiffusion.errors import UserError


def fastest(network: Raft, one: Tensor, other: Tensor, share: float) -> float:
    """Mean pixels that the fastest share of a frame (H, W, 3) uint8 moves until the other."""
    height, width = one.shape[:2]
    if min(height, width) < LEAST:
        raise UserError(f"is {height} x {width}, and RAFT needs {LEAST} x {LEAST}")
    down, across = -height % 8, -width % 8
    edges = (across // 2, across - across // 2, down // 2, down - down // 2)
    flow = network(*(F.pad(planes(frame[None]), edges, mode="replicate") for frame in (one, other)))
    speed = flow.norm(dim=1).flatten()
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
        frames = footage.pixels[:: max(1, round(footage.fps / 8))]
        limit, fast, is_dynamic = 6 * min(frames.shape[1:3]) / 256, 0, False
        for one, other in pairwise(frames):
            fast += fastest(network, one, other, 0.05) > limit
            # asked after a pair, as upstream does: of two frames, which need none, any do
            if is_dynamic := fast >= needed(len(frames)):
                break
        return Score(float(is_dynamic))


def is_static(network: Raft, pixels: Tensor) -> bool:
    """Whether at most an eighth of neighbouring frames (F, H, W, 3) move fast, and the ends differ little."""
    limit, most = 3 * min(pixels.shape[1:3]) / 256, round(2 * len(pixels) / 16)
    fast = 0
    for one, other in pairwise(pixels):
        fast += fastest(network, one, other, 0.02) > limit
        if fast > most:
            return False
    first, last = pixels[0], pixels[-1]
    return all(fastest(network, *ends, 0.02) <= limit * most * 2 for ends in ((first, last), (last, first)))
