"""What the small world is made of, and which (subject, motion, background) triples training may see."""

from functools import lru_cache
from itertools import product
from zlib import crc32

import torch
from torch import Tensor

from turbodiffusion.errors import UserError

SEEN = 64
HELD_OUT = 8
SUBJECTS = SEEN + HELD_OUT
MOTIONS = ("still", "left", "right", "up", "down", "grow", "shrink", "circle", "bounce")
COLORS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
BACKGROUNDS = (*COLORS, *(f"{color} gradient" for color in COLORS))
SPLITS = ("train", "held_out_combinations", "held_out_subjects")


def is_held_out(subject: int, motion: int, background: int) -> bool:
    """Whether training never shows this triple: one in ten, by a hash that no seed or machine changes."""
    return subject >= SEEN or crc32(f"{subject},{motion},{background}".encode()) % 10 == 0


@lru_cache
def triples(split: str) -> Tensor:
    """Every (subject, motion, background) of a split, (N, 3) int64, in lexicographic order."""
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
    subjects = range(SEEN, SUBJECTS) if split == "held_out_subjects" else range(SEEN)
    every = product(subjects, range(len(MOTIONS)), range(len(BACKGROUNDS)))
    return torch.tensor([triple for triple in every if is_held_out(*triple) == (split != "train")])
