"""Videos to score: which files of a folder they are, and their frames."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from evaluation.prompts import Prompt, Suite, file_name, parse_name
from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.memory import host_memory, readable
from turbodiffusion.pipelines.video_io import read_video

SUFFIXES = (".mp4", ".gif", ".mkv", ".mov", ".webm", ".avi")


@dataclass(frozen=True)
class Video:
    """A file, what it was asked to show, and the file it is compared with, whether or not that exists."""

    path: Path
    prompt: Prompt
    reference: Path | None = None

    @property
    def name(self) -> str:
        """Unique within a run."""
        return self.path.name


@dataclass(frozen=True)
class Found:
    """The videos of a folder by name.  odd: what else is there, and why it is left out.  missing: names."""

    videos: list[Video]
    odd: dict[str, str]
    missing: list[str]


def find_videos(folder: Path, suite: Suite | None = None, reference: Path | None = None) -> Found:
    """Match a folder's files to prompts; without a suite a file's prompt is its name.

    Raises UserError if a folder is none, or holds no video.
    """
    for each in (folder, reference or folder):
        if not each.is_dir():
            raise UserError(f"the folder of videos {each} does not exist")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    stems = {path.stem for path in files if path.suffix.lower() in SUFFIXES}
    prompts = None if suite is None else {prompt.name: prompt for prompt in suite.prompts}
    videos, odd = [], {}
    for path in files:
        try:
            if prompt := _asked(path, prompts, suite, stems):
                videos.append(Video(path, prompt, reference and reference / path.name))
        except UserError as error:
            odd[path.name] = str(error)
    if not videos:
        told = [f"; {name} {reason}" for name, reason in odd.items()][:3]
        raise UserError(f"{folder} holds no video to score{''.join(told)}")
    return Found(videos, odd, list(_missing(suite, stems)) if suite else [])


def _asked(
    path: Path, prompts: dict[str, Prompt] | None, suite: Suite | None, stems: set[str]
) -> Prompt | None:
    """A file's prompt; None for what lies beside a video, such as its record.  UserError says what is odd."""
    if path.suffix.lower() not in SUFFIXES:
        if path.stem in stems:
            return None
        raise UserError(f"is no video: those end in {', '.join(SUFFIXES)}")
    name, sample = parse_name(path.stem)
    if prompts is None:
        return Prompt(name, name)
    # a name that ends in a number of its own is whole
    prompt = prompts.get(path.stem) or prompts.get(name)
    if prompt is None:
        raise UserError(f"belongs to no prompt; names are {file_name('PROMPT', 0)} and so on")
    if suite.samples is not None and (sample is None or sample >= suite.samples):
        raise UserError(f"is not one of a prompt's {suite.samples} samples, which end in -0 and so on")
    return prompt


def _missing(suite: Suite, stems: set[str]) -> Iterator[str]:
    for prompt in suite.prompts:
        if suite.samples is not None:
            names = [file_name(prompt.name, i) for i in range(suite.samples)]
            yield from (name for name in names if Path(name).stem not in stems)
        elif not any(prompt.name in (stem, parse_name(stem)[0]) for stem in stems):
            yield file_name(prompt.name, 0)


@dataclass
class Footage:
    """A video, decoded: pixels (F, H, W, 3) uint8 and frames per second."""

    video: Video
    pixels: Tensor
    fps: float

    @cached_property
    def reference(self) -> Tensor:
        """Pixels of the file it is compared with, of the same shape; UserError if there are none such."""
        if self.video.reference is None or not self.video.reference.is_file():
            raise UserError(f"has no reference: {self.video.reference or 'no folder of them was given'}")
        pixels = decode(self.video.reference)[0].to(self.pixels.device)
        if pixels.shape != self.pixels.shape:
            raise UserError(f"is {tuple(self.pixels.shape)} but its reference {tuple(pixels.shape)}")
        return pixels


def load(video: Video, device: torch.device) -> Footage:
    """Decode a video onto a device."""
    pixels, fps = decode(video.path)
    return Footage(video, pixels.to(device), fps)


def decode(path: Path) -> tuple[Tensor, float]:
    """All frames (F, H, W, 3) uint8 as VBench's own readers give them, and frames per second.

    Raises UserError if the file can not be read, holds no frame or more of them than memory does.
    """
    try:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            needed = 2 * 3 * stream.frames * stream.height * stream.width  # as they come, and stacked
        if (free := host_memory()) is not None and needed > free:
            raise UserError(f"is too large: {readable(needed)} for its frames, {readable(free)} free")
        return read_video(path)
    # what a file without streams, frames or a frame rate raises
    except (av.FFmpegError, OSError, IndexError, RuntimeError, TypeError) as error:
        raise UserError(f"can not be read as a video: {getattr(error, 'strerror', None) or error}") from error


def middle(frames: int, count: int) -> list[int]:
    """Indices of the middles of `count` equal parts of so many frames; the last again if those are fewer."""
    edges = np.linspace(0, frames, min(count, frames) + 1).astype(int)
    index = [int(first + last - 1) // 2 for first, last in pairwise(edges)]
    return index + index[-1:] * (count - len(index))
