"""How well videos show what a text says: VBench's appearance and temporal style and overall consistency,
EvalCrafter's CLIPSIM (arXiv:2310.11440), and its CLIP-temp, which compares frames with each other."""

from abc import abstractmethod
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from evaluation.backbones.clip import load_image_tower, load_text_tower, load_tokenizer, load_viclip, tokens
from evaluation.backbones.pixels import for_clip, for_clip_by_pil
from evaluation.metrics.score import VideoMetric, in_parts
from evaluation.records import Score
from evaluation.videos import Footage, middle
from turbodiffusion.errors import UserError


# the last video's, known by identity: several dimensions look at the same frames
@lru_cache(maxsize=1)
def _seen(path: Path, pixels: Tensor) -> Tensor:
    network = load_image_tower(path, pixels.device)
    return in_parts(lambda part: network(for_clip_by_pil(part)), pixels)


@lru_cache
def _said(path: Path, vocabulary: Path, text: str, device: torch.device) -> Tensor:
    network = load_text_tower(path, device)
    return network(tokens(text, load_tokenizer(vocabulary), network, may_cut=False)).float()


class _FramesAndText(VideoMetric):
    """Mean cosine of CLIP ViT-B/32's features of every frame with those of a text."""

    weights = ("clip_b32", "vocabulary")

    @abstractmethod
    def text(self, footage: Footage) -> str:
        """What the frames should show."""

    def cosines(self, footage: Footage) -> Tensor:
        """(F,)."""
        path, pixels = self.files["clip_b32"], footage.pixels
        text = _said(path, self.files["vocabulary"], self.text(footage), pixels.device)
        return cosine_similarity(_seen(path, pixels), text, dim=-1).double()


class AppearanceStyle(_FramesAndText):
    """With the name of the style that was asked for, a mean over the frames of all videos."""

    name = "appearance_style"

    def text(self, footage: Footage) -> str:
        style = footage.video.prompt.auxiliary.get(self.name)
        if not isinstance(style, dict) or not isinstance(style.get(self.name), str):
            raise UserError("belongs to a prompt whose auxiliary_info names no appearance_style")
        return style[self.name]

    def score(self, footage: Footage) -> Score:
        cosines = self.cosines(footage)
        extras = {"frame_results": cosines.tolist(), "cur_sim": float(cosines[-1])}
        return Score(float(cosines.sum()), len(cosines), extras)


class ClipSim(_FramesAndText):
    """With the prompt, a mean over videos."""

    name = "clipsim"

    def text(self, footage: Footage) -> str:
        return footage.video.prompt.text

    def score(self, footage: Footage) -> Score:
        return Score(float(self.cosines(footage).mean()))


class ClipTemp(VideoMetric):
    """Mean cosine of CLIP ViT-B/32's features of neighbouring frames."""

    name = "clip_temp"
    least_frames = 2
    weights = ("clip_b32",)

    def score(self, footage: Footage) -> Score:
        seen = _seen(self.files["clip_b32"], footage.pixels)
        return Score(float(cosine_similarity(seen[1:], seen[:-1], dim=-1).double().mean()))


class OverallConsistency(VideoMetric):
    """Cosine of ViCLIP's features of 8 frames with those of the prompt, of which it reads 32 tokens."""

    name = "overall_consistency"
    weights = ("viclip", "vocabulary")

    def score(self, footage: Footage) -> Score:
        pixels = footage.pixels
        video, text = load_viclip(self.files["viclip"], pixels.device)
        frames = for_clip(pixels[middle(len(pixels), 8)], is_rounded=True)
        encode = load_tokenizer(self.files["vocabulary"])
        said = text(tokens(footage.video.prompt.text, encode, text, may_cut=True))
        return Score(float(cosine_similarity(video(frames[None]), said)))


class TemporalStyle(OverallConsistency):
    """The same, of prompts that ask for a style of motion."""

    name = "temporal_style"
