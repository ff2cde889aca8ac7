"""VBench's human action."""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from evaluation.backbones.pixels import for_umt
from evaluation.backbones.vit import load_umt
from evaluation.metrics.score import VideoMetric
from evaluation.records import Score
from evaluation.videos import Footage, middle
from turbodiffusion.errors import UserError

_LEAST = 0.85  # of what UMT must hold an action's probability to be


class HumanAction(VideoMetric):
    """Share of videos whose action, read from their name, is one of UMT's five likeliest, and likely."""

    name = "human_action"
    weights = ("umt", "actions")

    def score(self, footage: Footage) -> Score:
        pixels, names = footage.pixels, _actions(self.files["actions"])
        asked = action_of(footage.video.path.name)
        if asked not in names:
            raise UserError(f"is named after {asked!r}, which is no action that UMT knows")
        network = load_umt(self.files["umt"], pixels.device)
        logits = network(for_umt(pixels[middle(len(pixels), 16)])[None])[0]
        is_right = asked in likely(logits, names)
        return Score(float(is_right), extras={"cor_num_per_video": int(is_right)})


def action_of(file: str) -> str:
    """The action in a file's name, as upstream finds it."""
    return file.lower().split("-")[0].split("person is ")[-1].split("_")[0]


def likely(logits: Tensor, names: list[str]) -> list[str]:
    """Those of the five likeliest classes that are likely at all."""
    best = torch.sigmoid(logits).topk(5)
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [names[i] for probability, i in pairs if round(probability, 4) >= _LEAST]


@lru_cache
def _actions(path: Path) -> list[str]:
    """Names in the order of the network's classes."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    places = {int(place): name.lower() for name, place in rows}
    return [places[i] for i in range(len(places))]
