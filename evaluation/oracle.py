"""Reads subject, motion and background off a clip of the small world, knowing nothing of how it was made.

    python -m evaluation.oracle count=512 [device=cuda] [seed=0]

prints how often it is right about real held-out clips, clean or blurred and noisy, and what it says of noise.

The background is the median of the border; what differs from it is the sprite.  Every frame's sprite is cut
out about its centroid at its own scale and compared with every subject at every phase of its animation, cut
out of the same background in the same way.  The nearest also tells where the sprite's canvas lies, and that
canvas's path is compared with the curves of all motions (`evaluation/motion.py`).  Inside, lengths are in
pixels of half size.
"""

from dataclasses import astuple, dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

from evaluation.command import run
from evaluation.motion import classify
from turbodiffusion.errors import UserError
from turbodiffusion.small_world.clips import (
    FRAMES,
    PIXELS,
    area_weights,
    background_rows,
    draw_scenes,
    render,
)
from turbodiffusion.small_world.split import BACKGROUNDS, SUBJECTS
from turbodiffusion.small_world.sprites import PHASES, SIDE, Sprites, load_sprites

# everything is measured at half size: four times faster, and noise matters half as much
_HALF = PIXELS // 2
_BORDER = 2
_CROP = 16
# a cut-out reaches so many spreads (root mean square radii) from its centroid
_REACH = 2.0
# what differs by less, in any colour in [0, 1], is background; by more, wholly sprite
_FAINT, _FULL = 0.08, 0.24
# a sprite covers more and less than this in every frame
_LEAST_AREA, _MOST_AREA = 20.0, 0.45 * _HALF**2
# the canvas of the sprites that clips are compared with, about the middle of what clips show; the field
# around it; and the rows at which that lies: over a gradient a sprite's visible part depends on where it is
_CANVAS, _FIELD = 28, 32
_HEIGHTS = (2, 16, 30)
# at these a confidence is one half.  Real clips mismatch by 0.01 (blurred by 3 px: 0.1), a disc of a sprite's
# mean colour by 0.6, noise by 1; backgrounds lie 0.08 apart and more, their tints reach 0.03
_MISMATCH, _LOST, _DISTANCE = 0.45, 0.8, 0.12
_CLEAR = 0.5
_CLIPS_AT_ONCE = 32


@dataclass(frozen=True)
class Reading:
    """What a clip shows, with confidences in [0, 1]; None where it is unclear, below one half."""

    subject: int | None
    motion: int | None
    background: int | None
    subject_confidence: float
    motion_confidence: float
    background_confidence: float


@dataclass(frozen=True)
class Accuracy:
    """Share of clips whose attribute was read right; what is unclear is wrong."""

    subject: float
    motion: float
    background: float
    all_three: float


def accuracy(readings: list[Reading], truth: Tensor) -> Accuracy:
    """Compare readings with the (subject, motion, background) that were asked for, truth (B, 3) int64."""
    read = [(reading.subject, reading.motion, reading.background) for reading in readings]
    right = torch.tensor(
        [[a == b for a, b in zip(*pair, strict=True)] for pair in zip(read, truth.tolist(), strict=True)]
    )
    return Accuracy(*right.float().mean(dim=0).tolist(), float(right.all(dim=1).float().mean()))


@dataclass(frozen=True)
class _Cutouts:
    """Sprites cut out: pixels (..., 3 * 16 * 16), centre (..., 2), spread and area (...)."""

    pixels: Tensor
    centre: Tensor
    spread: Tensor
    area: Tensor

    def __getitem__(self, index: Tensor) -> "_Cutouts":
        return _Cutouts(self.pixels[index], self.centre[index], self.spread[index], self.area[index])

    def per_clip(self) -> "_Cutouts":
        parts = (self.pixels, self.centre, self.spread, self.area)
        return _Cutouts(*(part.unflatten(0, (-1, FRAMES)) for part in parts))


def _cut_out(difference: Tensor, unrest: Tensor) -> _Cutouts:
    """Find and cut out what differs from the background; difference (N, 3, H, W).

    unrest: (N,), the background's own median deviation; noise rarely exceeds 4.5 of these.
    """
    height, width = difference.shape[-2:]
    threshold = (4.5 * unrest).clamp(min=_FAINT)[:, None, None]
    mask = ((difference.abs().amax(dim=1) - threshold) / (_FULL - _FAINT)).clamp(0, 1)
    x = torch.arange(width, device=mask.device) + 0.5
    y = torch.arange(height, device=mask.device) + 0.5
    weight = mask
    for _ in range(3):
        area = weight.sum(dim=(1, 2)).clamp(min=1e-3)
        cx, cy = (weight.sum(dim=1) * x).sum(dim=1) / area, (weight.sum(dim=2) * y).sum(dim=1) / area
        square = (x - cx[:, None]).square()[:, None] + (y - cy[:, None]).square()[..., None]
        spread = ((weight * square).sum(dim=(1, 2)) / area).sqrt().clamp(min=1)
        # specks far away must not count: look again, nearer
        weight = mask * (square < (1.5 * _REACH * spread[:, None, None]).square())
    start, step = torch.stack((cx, cy)) - _REACH * spread, 2 * _REACH * spread / _CROP
    columns, rows = area_weights(start[0], step, _CROP, width), area_weights(start[1], step, _CROP, height)
    pixels = rows[:, None] @ difference @ columns[:, None].mT
    # without its local mean, a smear of the right colour resembles no sprite
    pixels = pixels - avg_pool2d(pixels, 9, stride=1, padding=4)
    return _Cutouts(pixels.flatten(1), torch.stack((cx, cy), dim=-1), spread, area)


def _rows(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Colour of the background's rows (B, 3, 64): the median of both borders of frames (B, F, 3, 64, 64).

    Also the border's median deviation (B,) from it.
    """
    border = torch.cat((frames[..., :_BORDER], frames[..., -_BORDER:]), dim=-1)
    border = border.permute(0, 2, 3, 1, 4).flatten(3)
    rows = border.median(dim=-1).values
    return rows, (border - rows[..., None]).abs().flatten(1).median(dim=1).values


def _match(found: _Cutouts, cast: _Cutouts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nearest subject (B,), its mismatch (B,), and its canvas: centre (B, F, 2) and side (B, F).

    found: (B, F), cast: (72 looks).  The mismatch is the squared distance over the larger squared
    norm, to the nearest look in every frame, the median of all frames.
    """
    energy, norm = found.pixels.square().sum(dim=-1, keepdim=True), cast.pixels.square().sum(dim=-1)
    mismatch = (energy + norm - 2 * found.pixels @ cast.pixels.T) / energy.maximum(norm)
    mismatch, look = mismatch.unflatten(-1, (SUBJECTS, -1)).min(dim=-1)
    score, subject = mismatch.median(dim=1).values.min(dim=-1)
    look = look.gather(-1, subject[:, None, None].expand(-1, FRAMES, 1))[..., 0]
    nearest = cast[subject[:, None] * (len(norm) // SUBJECTS) + look]
    scale = found.spread / nearest.spread
    centre = found.centre - scale[..., None] * (nearest.centre - _FIELD / 2)
    return subject, score, centre, scale * _CANVAS


class Oracle:
    """Reads clips on the sprites' device."""

    def __init__(self, sprites: Sprites) -> None:
        device, count = sprites.rgba.device, len(BACKGROUNDS)
        rows = background_rows(torch.arange(count, device=device), torch.zeros(count, 3, device=device))
        self._backgrounds = rows.unflatten(-1, (_HALF, 2)).mean(dim=-1)
        step = torch.full((1,), SIDE / _CANVAS, device=device)
        weights = area_weights(step * (_CANVAS - _FIELD) / 2, step, _FIELD, SIDE)[0]
        looks = torch.arange(SUBJECTS * PHASES, device=device).split(PHASES)
        layers = [weights @ sprites.premultiplied(n // PHASES, n % PHASES) @ weights.T for n in looks]
        self._layers = torch.cat(layers)
        self._casts: dict[int, _Cutouts] = {}

    def read(self, frames: Tensor) -> list[Reading]:
        """Readings of clips (B, 3, 33, 128, 128) in [-1, 1], on any device."""
        wanted = (3, FRAMES, PIXELS, PIXELS)
        if frames.shape[1:] != wanted:
            raise UserError(f"the oracle reads small-world clips (B, *{wanted}), got {tuple(frames.shape)}")
        parts = frames.split(_CLIPS_AT_ONCE)
        return [reading for part in parts for reading in self._read(part.to(self._backgrounds.device))]

    def _read(self, frames: Tensor) -> list[Reading]:
        small = avg_pool2d(frames.float().flatten(0, 1), 2).unflatten(0, (-1, 3)).transpose(1, 2) / 2 + 0.5
        rows, unrest = _rows(small)
        distance, background = (rows[:, None] - self._backgrounds).abs().mean(dim=(2, 3)).min(dim=1)
        difference = (small - rows[:, None, ..., None]).flatten(0, 1)
        found = _cut_out(difference, unrest.repeat_interleave(FRAMES)).per_clip()

        subject, mismatch = torch.empty_like(background), torch.empty_like(distance)
        centre, size = torch.empty_like(found.centre), torch.empty_like(found.spread)
        for number in background.unique().tolist():
            group = background == number
            match = _match(found[group], self._cast(number))
            subject[group], mismatch[group], centre[group], size[group] = match
        motion, motion_confidence = classify(2 * centre, 2 * size)

        is_there = ((found.area > _LEAST_AREA) & (found.area < _MOST_AREA)).float().mean(dim=1)
        confidence = (
            is_there / (1 + (mismatch / _MISMATCH) ** 2),
            # a path is worth what is known of the thing that takes it
            is_there * motion_confidence / (1 + (mismatch / _LOST) ** 4),
            1 / (1 + ((distance + unrest) / _DISTANCE) ** 2),
        )
        numbers = torch.stack((subject, motion, background), dim=1)
        confidence = torch.stack(confidence, dim=1)
        return [
            Reading(*(n if c >= _CLEAR else None for n, c in zip(*row, strict=True)), *row[1])
            for row in zip(numbers.tolist(), confidence.tolist(), strict=True)
        ]

    def _cast(self, background: int) -> _Cutouts:
        """Every subject in every look, cut out of this background; made when first needed."""
        if background not in self._casts:
            heights = _HEIGHTS if "gradient" in BACKGROUNDS[background] else _HEIGHTS[:1]
            rows = self._backgrounds[background].unfold(-1, _FIELD, 1)[:, heights].transpose(0, 1)[..., None]
            colour, alpha = self._layers[:, None].split((3, 1), dim=2)
            # premultiplied colours are in [-1, 1], the background and the difference in [0, 1]
            difference = ((colour + alpha) / 2 - alpha * rows).flatten(0, 1)
            self._casts[background] = _cut_out(difference, difference.new_zeros(len(difference)))
        return self._casts[background]


def degrade(frames: Tensor, generator: torch.Generator, *, blur: float = 1.0, noise: float = 0.05) -> Tensor:
    """Clips (B, 3, F, H, W) blurred by a Gaussian of so many px and with noise, as an autoencoder might."""
    x = torch.arange(-4, 5, device=frames.device)
    kernel = torch.exp(-0.5 * (x / blur) ** 2)
    kernel = kernel / kernel.sum()
    images = pad(frames.flatten(0, 2)[:, None], (4, 4, 4, 4), mode="replicate")
    images = conv2d(conv2d(images, kernel.view(1, 1, 1, 9)), kernel.view(1, 1, 9, 1)).view_as(frames)
    return images + noise * torch.randn(frames.shape, generator=generator).to(frames.device)


@dataclass
class Options:
    """count: clips of each kind; seed: of the scenes; device: where to render and read."""

    count: int = 512
    seed: int = 0
    device: str = "cpu"


def report(options: Options) -> None:
    """Print the oracle's own accuracy on clips whose truth is known, and on clips that show nothing."""
    sprites = load_sprites().to(options.device)
    oracle = Oracle(sprites)
    generator = torch.Generator().manual_seed(options.seed)
    kinds = {
        "clean": lambda frames: frames,
        "blur 1 px, noise 0.05": lambda frames: degrade(frames, generator),
        "nothing but noise": lambda frames: torch.randn(frames.shape, generator=generator),
    }
    headings = "clips", "as", "subject", "motion", "background", "all three"
    table = Table(*headings, title=f"{options.count} clips each")
    for split in ("held_out_combinations", "held_out_subjects"):
        for kind, change in kinds.items():
            scenes = draw_scenes(options.count, generator, split)
            readings: list[Reading] = []
            for start in track(range(0, options.count, _CLIPS_AT_ONCE), f"{split}, {kind}"):
                readings += oracle.read(change(render(scenes[start : start + _CLIPS_AT_ONCE], sprites)))
            truth = torch.stack((scenes.subject, scenes.motion, scenes.background), dim=1)
            shares = astuple(accuracy(readings, truth))
            table.add_row(split.replace("_", " "), kind, *(f"{100 * share:.1f} %" for share in shares))
    Console().print(table)


if __name__ == "__main__":
    run(Options, report)
