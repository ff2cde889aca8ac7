"""Real videos and their captions, as clips of one size, length and rate."""

import csv
from collections import Counter
from itertools import islice
from pathlib import Path

import av
import torch
from torch import Tensor

from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.conditioning import prepare
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.pipelines.video_io import decoder

SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}
SLOWEST = 0.9  # of the rate asked for; a slower video would show frames twice


def list_videos(folder: str | None, table: str | None) -> list[tuple[Path, str]]:
    """Videos and captions: a folder's, sorted, each with the .txt of its name, or those a csv lists."""
    if (folder is None) == (table is None):
        raise UserError("mode=encode takes videos=FOLDER or csv=FILE, one of them")
    source = Path(table if folder is None else folder).expanduser()
    videos = _of_csv(source) if folder is None else _of_folder(source)
    if not videos:
        raise UserError(f"{source} names no video")
    for file, caption in videos:
        if not file.is_file():
            raise UserError(f"{source}: the video {file} does not exist")
        if not caption:
            raise UserError(f"{source}: {file.name} has no caption (in a folder: a .txt of its name)")
    return videos


def _of_folder(folder: Path) -> list[tuple[Path, str]]:
    if not folder.is_dir():
        raise UserError(f"videos={folder} is not a folder")
    videos = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    texts = [file.with_suffix(".txt") for file in videos]
    captions = [text.read_text(encoding="utf-8").strip() if text.is_file() else "" for text in texts]
    return list(zip(videos, captions, strict=True))


def _of_csv(file: Path) -> list[tuple[Path, str]]:
    """Of its columns path (relative to the file) and caption."""
    if not file.is_file():
        raise UserError(f"csv={file} does not exist")
    with file.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines, restval="")
        if lost := {"path", "caption"} - set(reader.fieldnames or ()):
            raise UserError(f"{file} lacks the column {' and '.join(sorted(lost))} in its first line")
        return [(file.parent / row["path"], row["caption"].strip()) for row in reader]


def read_clip(path: Path, frames: int, fps: float, size: Size) -> Tensor:
    """The first frames at `fps`, scaled to cover the size and cut around the middle: (3, F, H, W) in [-1, 1].

    UserError if the file is no video, too short or too slow.
    """
    picked: list[Tensor] = []
    pixels_of = decoder()
    try:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            rate = float(stream.average_rate or 0)
            if rate < SLOWEST * fps:
                raise UserError(f"{path} has {rate:g} frames a second, wanted {fps:g}: pass fps={rate:g}")
            wanted = Counter(round(i * rate / fps) for i in range(frames))
            for number, frame in enumerate(islice(file.decode(stream), max(wanted) + 1)):
                if wanted[number]:
                    fitted = prepare(_cut(pixels_of(frame).permute(2, 0, 1), size), size)
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
