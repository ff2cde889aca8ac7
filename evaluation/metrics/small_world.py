"""Whether a clip of the small world shows what its caption says, in the eyes of the oracle."""

from functools import lru_cache
from itertools import product

import torch

from evaluation.metrics.score import VideoMetric
from evaluation.oracle import Oracle
from evaluation.records import Score
from evaluation.videos import Footage
from turbodiffusion.errors import UserError
from turbodiffusion.small_world.captions import PHRASINGS, caption
from turbodiffusion.small_world.split import BACKGROUNDS, MOTIONS
from turbodiffusion.small_world.sprites import load_sprites, subject_names


class SmallWorld(VideoMetric):
    """Share of clips whose subject, motion and background are all three as asked."""

    name = "small_world"

    def score(self, footage: Footage) -> Score:
        asked = meaning(footage.video.prompt.text)
        frames = footage.pixels.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        reading = _oracle(frames.device).read(frames)[0]
        read = {name: getattr(reading, name) for name in ("subject", "motion", "background")}
        right = {name: read[name] == wanted for name, wanted in zip(read, asked, strict=True)}
        return Score(float(all(right.values())), extras=right)


@lru_cache
def _oracle(device: torch.device) -> Oracle:
    return Oracle(load_sprites().to(device))


@lru_cache
def meaning(text: str) -> tuple[int, int, int]:
    """Subject, motion and background of a caption; UserError if the small world has no such caption."""
    for subject, name in enumerate(subject_names()):
        if name in text:
            kinds = product(range(len(MOTIONS)), range(len(BACKGROUNDS)), range(PHRASINGS))
            for motion, background, phrasing in kinds:
                if caption(name, motion, background, phrasing) == text:
                    return subject, motion, background
    raise UserError(f"was asked for {text!r}, which is no caption of the small world")
