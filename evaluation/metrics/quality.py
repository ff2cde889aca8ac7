"""VBench's aesthetic and imaging quality: means over frames, then over videos."""

import torch
from torch.nn.functional import linear, normalize

from evaluation.backbones.clip import load_image_tower
from evaluation.backbones.musiq import load_musiq
from evaluation.backbones.pixels import for_clip, for_musiq
from evaluation.backbones.weights import read_state
from evaluation.metrics.score import VideoMetric, in_parts
from evaluation.records import Score
from evaluation.videos import Footage


class AestheticQuality(VideoMetric):
    """A tenth of what LAION's linear predictor makes of CLIP ViT-L/14's features."""

    name = "aesthetic_quality"
    weights = ("clip_l14", "aesthetic")

    def score(self, footage: Footage) -> Score:
        device = footage.pixels.device
        network = load_image_tower(self.files["clip_l14"], device)
        seen = normalize(in_parts(lambda part: network(for_clip(part)), footage.pixels), dim=-1)
        head = {name: x.to(device, torch.float32) for name, x in read_state(self.files["aesthetic"]).items()}
        return Score(float(linear(seen, **head).double().mean()) / 10)


class ImagingQuality(VideoMetric):
    """A hundredth of MUSIQ's rating of frames whose longer side is at most 512."""

    name = "imaging_quality"
    weights = ("musiq",)

    def score(self, footage: Footage) -> Score:
        network = load_musiq(self.files["musiq"], footage.pixels.device)
        # 200 patches a frame: fewer at a time
        ratings = in_parts(lambda part: network(for_musiq(part)), footage.pixels, 8)
        return Score(float(ratings.double().mean()) / 100)
