"""The cast: animated RGBA sprites read from `assets/sprites`."""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from turbodiffusion.errors import UserError
from turbodiffusion.small_world.split import HELD_OUT, SEEN, SUBJECTS

SPRITES = Path(__file__).resolve().parents[2] / "assets" / "sprites"
PHASES = 24
SIDE = 96


@dataclass(frozen=True)
class Sprites:
    """Every subject's animation loop, seen subjects first.

    rgba: (S, 24, 4, 96, 96) uint8, alpha not premultiplied, 8 frames a second.
    """

    names: tuple[str, ...]
    held_out: tuple[bool, ...]
    rgba: Tensor

    def to(self, device: torch.device | str) -> "Sprites":
        """The same cast with its pixels on another device: what renders there."""
        return replace(self, rgba=self.rgba.to(device))

    def premultiplied(self, subject: Tensor, phase: Tensor) -> Tensor:
        """Frames (N, 4, 96, 96) fp32 of subjects and phases (N,): alpha * colour in [-1, 1], then alpha."""
        frames = self.rgba[subject, phase].float() / 255
        frames[:, :3].mul_(2).sub_(1).mul_(frames[:, 3:])
        return frames


@lru_cache
def _index(folder: Path) -> list[dict[str, str | bool]]:
    if not (folder / "index.json").is_file():
        raise UserError(
            f"no sprites in {folder}; make them with: python -m tools.select_sprites dst={folder}"
        )
    index = json.loads((folder / "index.json").read_text())
    if [entry["held_out"] for entry in index] != [i >= SEEN for i in range(SUBJECTS)]:
        raise UserError(f"{folder}/index.json must list {SEEN} seen and then {HELD_OUT} held-out subjects")
    return index


def subject_names(folder: Path = SPRITES) -> tuple[str, ...]:
    """The subjects' names, by subject number."""
    return tuple(entry["name"] for entry in _index(folder))


def _read(path: Path) -> np.ndarray:
    """Frames (24, 96, 96, 4) uint8 of one animated file."""
    try:
        with Image.open(path) as clip:
            frames = []
            for phase in range(PHASES):
                clip.seek(phase)
                frames.append(np.asarray(clip.convert("RGBA")))
    except (OSError, EOFError, UnidentifiedImageError) as error:
        raise UserError(f"{path} is no sprite of {PHASES} frames ({error}); select it anew") from error
    return np.stack(frames)


def load_sprites(folder: Path = SPRITES) -> Sprites:
    """Read the cast onto the CPU."""
    index = _index(folder)
    frames = np.stack([_read(folder / entry["file"]) for entry in index])
    return Sprites(
        names=subject_names(folder),
        held_out=tuple(entry["held_out"] for entry in index),
        rgba=torch.from_numpy(frames).permute(0, 1, 4, 2, 3).contiguous(),
    )
