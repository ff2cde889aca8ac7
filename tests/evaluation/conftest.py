"""Videos made on the spot, and commands called as their users call them."""

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from evaluation.command import run
from evaluation.prompts import Prompt
from evaluation.videos import Footage, Video

ExitCode = Callable[..., int]


@pytest.fixture
def exit_code(monkeypatch: pytest.MonkeyPatch) -> ExitCode:
    """A command's options and its task, and words -> what it ends with."""

    def called(kind: type, task: Callable[..., object], *words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["command", *words])
        try:
            run(kind, task)
        except SystemExit as stopped:
            return int(stopped.code)
        return 0

    return called


@pytest.fixture
def write_lossless() -> Callable[[Path, Tensor], None]:
    """Pixels (F, H, W, 3) uint8 into an mp4 that decodes to the same."""

    def write(path: Path, pixels: Tensor) -> None:
        with av.open(str(path), "w", format="mp4") as file:
            stream = file.add_stream(
                "libx264rgb", rate=Fraction(16), options={"qp": "0", "preset": "ultrafast"}
            )
            stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "rgb24"
            for picture in pixels.numpy():
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())

    return write


@pytest.fixture
def footage() -> Callable[..., Footage]:
    """Pixels as if they had been read; reference: pixels too."""

    def make(pixels: Tensor, reference: Tensor | None = None, prompt: str = "a cat") -> Footage:
        made = Footage(Video(Path("a.mp4"), Prompt(prompt, prompt)), pixels, 16.0)
        if reference is not None:
            made.reference = reference
        return made

    return make


@pytest.fixture
def folder(tmp_path: Path, write_lossless: Callable[[Path, Tensor], None]) -> Path:
    """Six videos: three prompts, two samples each."""
    made = tmp_path / "videos"
    made.mkdir()
    for prompt in ("a cat", "a dog", "3-2 on the board"):
        for sample in range(2):
            write_lossless(made / f"{prompt}-{sample}.mp4", torch.randint(256, (4, 16, 32, 3)).byte())
    return made
