"""VBench's subject and background consistency: how alike frames are to the one before and to the first."""

from dataclasses import replace

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

    def look(self, frames: Tensor) -> Tensor:
        """Features (F, D) of frames (F, H, W, 3) uint8."""
        return load_dino(self.files["dino_b16"], frames.device)(for_dino(frames))

    def score(self, footage: Footage) -> Score:
        alike = likeness(in_parts(self.look, footage.pixels))
        return Score(float(alike.double().sum()), len(alike))


class BackgroundConsistency(SubjectConsistency):
    """The same in the eyes of CLIP ViT-B/32."""

    name = "background_consistency"
    weights = ("clip_b32",)

    def look(self, frames: Tensor) -> Tensor:
        return load_image_tower(self.files["clip_b32"], frames.device)(for_clip(frames))

    def score(self, footage: Footage) -> Score:
        score = super().score(footage)
        return replace(score, extras={"video_sim": score.total, "cnt_per_video": score.units})
