"""Real videos and their captions, as clips of one size, length and rate."""

import csv
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import torch
from torch import Tensor

from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.conditioning import prepare
from turbodiffusion.pipelines.sizes import Size

SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}
SLOWEST = 0.9  # of the rate asked for; a slower video would show frames twice


@dataclass(frozen=True)
class CaptionedVideo:
    """A video file and what it shows."""

    video: Path
    caption: str


def list_folder(folder: Path) -> list[CaptionedVideo]:
    """The videos of a folder, sorted, each with the text file of the same name."""
    if not folder.is_dir():
        raise UserError(f"videos={folder} is not a folder")
    videos = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if bare := [path.name for path in videos if not path.with_suffix(".txt").is_file()]:
        raise UserError(f"{folder}: {', '.join(bare[:5])} has no caption: put it into a .txt of that name")
    found = [
        CaptionedVideo(path, path.with_suffix(".txt").read_text(encoding="utf-8").strip()) for path in videos
    ]
    return _checked(found, f"videos={folder}")


def list_csv(file: Path) -> list[CaptionedVideo]:
    """The rows of a csv with the columns path (relative to the file) and caption."""
    if not file.is_file():
        raise UserError(f"csv={file} does not exist")
    with file.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines)
        if lost := {"path", "caption"} - set(reader.fieldnames or ()):
            raise UserError(f"{file} lacks the column {' and '.join(sorted(lost))} in its first line")
        found = [
            CaptionedVideo(file.parent / (row["path"] or ""), (row["caption"] or "").strip())
            for row in reader
        ]
    return _checked(found, f"csv={file}")


def _checked(found: list[CaptionedVideo], source: str) -> list[CaptionedVideo]:
    if not found:
        raise UserError(f"{source} names no video")
    for item in found:
        if not item.video.is_file():
            raise UserError(f"{source}: the video {item.video} does not exist")
        if not item.caption:
            raise UserError(f"{source}: {item.video} has an empty caption")
    return found


def read_clip(path: Path, frames: int, fps: float, size: Size) -> Tensor:
    """The first frames at `fps`, scaled to cover the size and cut around the middle: (3, F, H, W) in [-1, 1].

    UserError if the file is no video, too short or too slow.
    """
    picked: list[Tensor] = []
    try:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            rate = float(stream.average_rate or 0)
            if rate < SLOWEST * fps:
                raise UserError(f"{path} has {rate:g} frames a second, wanted {fps:g}: pass fps={rate:g}")
            wanted = Counter(round(i * rate / fps) for i in range(frames))
            for number, frame in enumerate(islice(file.decode(stream), max(wanted) + 1)):
                if wanted[number]:
                    pixels = frame.to_ndarray(format="rgb24", src_colorspace=frame.colorspace)
                    fitted = prepare(_cut(torch.from_numpy(pixels).permute(2, 0, 1), size), size)
                    picked += [fitted] * wanted[number]
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{path} can not be read as a video: {error}") from error
    if len(picked) < frames:
        seconds = (frames - 1) / fps
        raise UserError(f"{path} is shorter than {frames} frames at {fps:g} a second ({seconds:.2f} s)")
    return torch.stack(picked, dim=2)[0]


def _cut(pixels: Tensor, size: Size) -> Tensor:
    """The largest middle part of (3, H, W) in the shape of the size."""
    height, width = pixels.shape[1:]
    part = min(height / size.height, width / size.width)
    h, w = max(1, round(size.height * part)), max(1, round(size.width * part))
    top, left = (height - h) // 2, (width - w) // 2
    return pixels[:, top : top + h, left : left + w]
