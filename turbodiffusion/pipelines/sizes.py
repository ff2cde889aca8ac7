"""Sizes and frame counts: the named resolutions, what fits a model, and the nearest that do."""

import re
from dataclasses import dataclass
from math import sqrt

from turbodiffusion.errors import UserError

TEMPORAL_FACTOR = 4

ASPECTS = ("1:1", "4:3", "3:4", "16:9", "9:16")
# (width, height) of each name, one per aspect; "480" and "480p" are different rows
RESOLUTIONS = {
    "480p": ((640, 640), (640, 480), (480, 640), (832, 480), (480, 832)),
    "720p": ((960, 960), (960, 720), (720, 960), (1280, 720), (720, 1280)),
    "480": ((480, 480), (640, 480), (480, 640), (768, 432), (432, 768)),
    "512": ((512, 512), (640, 512), (512, 640), (640, 384), (384, 640)),
    "720": ((960, 960), (960, 704), (704, 960), (1280, 704), (704, 1280)),
}


@dataclass(frozen=True)
class Size:
    """Pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def parse_size(size: str, aspect: str = "16:9") -> Size:
    """A name of the table (with its aspect) or WIDTHxHEIGHT -> Size."""
    if size in RESOLUTIONS:
        if aspect not in ASPECTS:
            raise UserError(f"aspect={aspect} is not one of {', '.join(ASPECTS)}.")
        return Size(*RESOLUTIONS[size][ASPECTS.index(aspect)])
    if match := re.fullmatch(r"(\d+)[xX*×](\d+)", size.strip()):
        return Size(int(match[1]), int(match[2]))
    raise UserError(f"size={size} is neither WIDTHxHEIGHT nor one of {', '.join(RESOLUTIONS)}.")


def check_size(size: Size, multiple: int) -> Size:
    """The size, if both sides divide by `multiple` (VAE factor times patch)."""
    if min(size.width, size.height) > 0 and not (size.width % multiple or size.height % multiple):
        return size
    fits = map(Size, *(_around(side, multiple, least=multiple) for side in (size.width, size.height)))
    raise UserError(
        f"size={size} does not fit this model: width and height must divide by {multiple}; the nearest that "
        f"do: {', '.join(dict.fromkeys(map(str, fits)))}."
    )


def check_frames(frames: int) -> int:
    """The frame count, if it is 1 mod 4: the VAE makes a latent of the first frame, then one of every 4."""
    if frames >= 1 and frames % TEMPORAL_FACTOR == 1:
        return frames
    fits = dict.fromkeys(str(1 + later) for later in _around(frames - 1, TEMPORAL_FACTOR, least=0))
    raise UserError(
        f"frames={frames} does not fit: it must be 1 more than a multiple of {TEMPORAL_FACTOR}; the nearest: "
        f"{', '.join(fits)}."
    )


def adaptive_size(area: Size, image: Size, multiple: int) -> Size:
    """About the area of `area` in the shape of `image`; each side rounded, half to even, to the multiple."""
    pixels, ratio = area.width * area.height, image.height / image.width
    sides = (sqrt(pixels / ratio), sqrt(pixels * ratio))
    return Size(*(max(1, round(side / multiple)) * multiple for side in sides))


def latent_frames(frames: int) -> int:
    """T of a clip of F frames."""
    return 1 + (frames - 1) // TEMPORAL_FACTOR


def _around(value: int, multiple: int, *, least: int) -> tuple[int, int]:
    """The multiples just below and above; twice the value itself if it is one, twice the least below it."""
    below = max(least, value // multiple * multiple)
    return below, below if value <= below else below + multiple
