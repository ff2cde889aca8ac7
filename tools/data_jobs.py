"""What the samples of a set are made by: a teacher, real videos, or a text encoder alone.

A job is called with global sample numbers and gives those samples, on the CPU in bf16.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill.shard_files import Keyed, Sample
from tools.video_clips import CaptionedVideo, read_clip
from turbodiffusion.checkpoints import load_image_encoder, load_text_encoder, load_vae
from turbodiffusion.checkpoints.loading import on_meta
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel
from turbodiffusion.pipelines.conditioning import prepare
from turbodiffusion.pipelines.found import Found
from turbodiffusion.pipelines.generate import Clip, Encoded, Models, OnProgress, Pipeline, Watch, vae_chunk
from turbodiffusion.pipelines.prompts import Item
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.pipelines.video_io import read_picture


@dataclass(frozen=True)
class Frame:
    """What all clips have in common."""

    size: Size
    frames: int


@dataclass(frozen=True)
class TeacherSamples:
    """The teacher's clips, from noise of seed + number; the prompts repeat from the first on."""

    pipeline: Pipeline
    items: list[Item]
    frame: Frame
    seed: int
    on_progress: OnProgress

    def __call__(self, numbers: range) -> list[Keyed]:
        items = [self.items[number % len(self.items)] for number in numbers]
        watch = Watch(self.pipeline.device, self.on_progress)
        clip = Clip(
            prompts=[item.prompt for item in items],
            size=self.frame.size,
            frames=self.frame.frames,
            image=self._pictures([item.image for item in items]),
            last_image=self._pictures([item.last_image for item in items]),
        )
        try:
            encoded = self.pipeline.encode(clip, watch)
            latents = self.pipeline.denoise(encoded, [self.seed + number for number in numbers], watch)
        finally:
            self.pipeline.residence.release()
        return keyed(numbers, clip, encoded, latents)

    def _pictures(self, files: list[Path | None]) -> Tensor | None:
        """(B, 3, H, W) in [-1, 1]."""
        pictures = [prepare(read_picture(file), self.frame.size) for file in files if file is not None]
        return torch.cat(pictures) if pictures else None


@dataclass(frozen=True)
class VideoClips:
    """Real videos, with what the network is told of their first frame (pictures=1) and their last (2)."""

    pipeline: Pipeline
    videos: list[CaptionedVideo]
    frame: Frame
    fps: float
    pictures: int
    skip_broken: bool
    on_progress: OnProgress

    @torch.no_grad()
    def __call__(self, numbers: range) -> list[Keyed]:
        read = {number: frames for number in numbers if (frames := self._read(number)) is not None}
        if not read:
            return []
        pixels = torch.stack(list(read.values())).to(self.pipeline.device)
        clip = Clip(
            prompts=[self.videos[number].caption for number in read],
            size=self.frame.size,
            frames=self.frame.frames,
            image=pixels[:, :, 0] if self.pictures > 0 else None,
            last_image=pixels[:, :, -1] if self.pictures > 1 else None,
        )
        vae, watch = self.pipeline.models.vae, Watch(self.pipeline.device, self.on_progress)
        try:
            encoded = self.pipeline.encode(clip, watch)
            self.pipeline.residence.use(vae)
            latents = vae.encode(pixels, chunk=vae_chunk(vae, (len(read), *encoded.shape), tiled=False))
        finally:
            self.pipeline.residence.release()
        return keyed(read, clip, encoded, latents)

    def _read(self, number: int) -> Tensor | None:
        try:
            return read_clip(self.videos[number].video, self.frame.frames, self.fps, self.frame.size)
        except UserError as error:
            if not self.skip_broken:
                raise UserError(f"{error}; or pass skip_broken=true to leave such videos out") from error
            warnings.warn(f"left out: {error}", stacklevel=2)
            return None


@dataclass(frozen=True)
class Texts:
    """Prompts alone, in order."""

    pipeline: Pipeline
    prompts: list[str]

    @torch.no_grad()
    def __call__(self, numbers: range) -> list[Keyed]:
        encoder, prompts = self.pipeline.models.text_encoder, self.prompts[numbers.start : numbers.stop]
        self.pipeline.residence.use(encoder)
        # each alone: a batch is padded to its longest text, which would show in the last bits
        rows = [encoder([prompt])[0].bfloat16().cpu() for prompt in prompts]
        self.pipeline.residence.release()
        samples = (Sample(prompt, row) for prompt, row in zip(prompts, rows, strict=True))
        return [(key(number), sample) for number, sample in zip(numbers, samples, strict=True)]


def key(number: int) -> str:
    """A sample's name in its shard."""
    return f"{number:09d}"


def keyed(numbers: Iterable[int], clip: Clip, encoded: Encoded, latents: Tensor) -> list[Keyed]:
    """What was made of a batch, sample by sample."""
    made = {"context": encoded.context, "latents": latents}
    made |= {"condition": encoded.condition, "clip": encoded.clip}
    count = len(clip.prompts)
    rows = {name: x.expand(count, *x.shape[1:]).bfloat16().cpu() for name, x in made.items() if x is not None}
    return [
        (key(number), Sample(prompt, **{name: x[i] for name, x in rows.items()}))
        for i, (number, prompt) in enumerate(zip(numbers, clip.prompts, strict=True))
    ]


def load_encoders(found: Found, *, device: torch.device, dtype: torch.dtype) -> Models:
    """All models but the network, which is there in shape only and takes no memory."""
    reports, where = found.reports, {"device": device, "dtype": dtype}
    network = reports["network"]
    clip = {}
    if "image_encoder" in reports:
        clip["image_encoder"] = load_image_encoder(reports["image_encoder"].path, **where)
    return Models(
        network=on_meta(lambda: WanModel(**network.config), network.path),
        vae=load_vae(reports["vae"].path, **where),
        text_encoder=load_text_encoder(reports["text_encoder"].path, tokenizer=found.tokenizer, **where),
        **clip,
    )
