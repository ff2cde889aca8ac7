"""VBench's subject and background consistency: how alike frames are to the one before and to the first."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from evaluation.backbones.clip import load_image_tower
from evaluation.backbones.pixels import for_clip, for_dino
from evaluation.backbones.vit import load_dino
from evaluation.metrics.score import VideoMetric, in_parts
from evaluation.records import Score
from evaluation.videos import Footage


def likeness(features: Tensor) -> Tensor:
    """Features (F, D) -> (F - 1,): mean cosine of each later frame with the one before and the first, each at
    least 0."""
    before, first = features[:-1], features[:1]
    cosines = [cosine_similarity(features[1:], other, dim=-1) for other in (before, first)]
    return torch.stack(cosines).clamp(min=0).mean(dim=0)


class SubjectConsistency(VideoMetric):
    """In the eyes of DINO ViT-B/16, a mean over the frames of all videos."""

    name = "subject_consistency"
    least_frames = 2
    weights = ("dino_b16",)

    def score(self, footage: Footage) -> Score:
        network = load_dino(self.files["dino_b16"], footage.pixels.device)
        alike = likeness(in_parts(lambda part: network(for_dino(part)), footage.pixels))
        return Score(float(alike.double().sum()), len(alike))


class BackgroundConsistency(VideoMetric):
    """In the eyes of CLIP ViT-B/32, a mean over the frames of all videos."""

    name = "background_consistency"
    least_frames = 2
    weights = ("clip_b32",)

    def score(self, footage: Footage) -> Score:
        network = load_image_tower(self.files["clip_b32"], footage.pixels.device)
        alike = likeness(in_parts(lambda part: network(for_clip(part)), footage.pixels))
        total = float(alike.double().sum())
        return Score(total, len(alike), {"video_sim": total, "cnt_per_video": len(alike)})
