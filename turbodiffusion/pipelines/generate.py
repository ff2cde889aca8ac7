"""The pipeline: text and pictures -> latents -> frames.  No files, no options, no printing.

Shapes: B samples, T latent and F pixel frames, z latent channels, S text tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from turbodiffusion.errors import UserError
from turbodiffusion.models.clip import ImageEncoder
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.models.vae_tiling import TILE, decode_bytes, decode_tiled, encode_tiled
from turbodiffusion.models.wan import CLIP_TOKENS, PATCH, WanModel
from turbodiffusion.pipelines.conditioning import condition, known_frames
from turbodiffusion.pipelines.offload import Offload, Residence
from turbodiffusion.pipelines.schedule import TEACHERS, sampling_times
from turbodiffusion.pipelines.sizes import Size, check_frames, check_size, latent_frames
from turbodiffusion.samplers.denoiser import Denoiser
from turbodiffusion.samplers.few_step import sample_rcm
from turbodiffusion.samplers.noise import SampleNoise
from turbodiffusion.variants import Sampling

# what decoding may take beyond the least it needs
CHUNK_BYTES = 2**30

OnProgress = Callable[[str, int, int], None]  # stage, done, of


@dataclass(frozen=True, kw_only=True)
class Models:
    """What a pipeline runs.  network_low is the low-noise one of two experts."""

    network: WanModel
    vae: VideoVAE
    text_encoder: TextEncoder
    network_low: WanModel | None = None
    image_encoder: ImageEncoder | None = None


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What to make: B prompts, or one for all samples.  negative: None for the checkpoint's own.

    Pictures are (B or 1, 3, H, W) in [-1, 1], of that size.
    """

    prompts: Sequence[str]
    size: Size
    frames: int
    image: Tensor | None = None
    last_image: Tensor | None = None
    negative: str | None = None


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A Clip as the network sees it: the latents' shape, and what a Denoiser calls by the same names."""

    shape: tuple[int, int, int, int]  # of the latents of one sample: z, T, h, w
    context: Tensor
    negative: Tensor | None
    condition: Tensor | None = None
    clip: Tensor | None = None
    first_frame: Tensor | None = None


@dataclass
class Watch:
    """Seconds spent in each stage, and the caller's progress hook."""

    device: torch.device
    on_progress: OnProgress | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, total: int = 1) -> Iterator[Callable[[int], None]]:
        """Time the block, which may report how much of the total is done."""
        start = perf_counter()

        def report(done: int) -> None:
            if self.on_progress is not None:
                self.on_progress(name, done, total)

        report(0)
        yield report
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start
        report(total)


@dataclass(frozen=True)
class Generated:
    """frames (B, 3, F, H, W) fp32 in [-1, 1], and the seconds of each stage."""

    frames: Tensor
    seconds: dict[str, float]


def latent_shape(vae: VideoVAE, frames: int, size: Size) -> tuple[int, int, int, int]:
    """The latents of one clip: z, T, h, w."""
    height, width = size.height // vae.spatial_factor, size.width // vae.spatial_factor
    return vae.latent_channels, latent_frames(frames), height, width


def vae_chunk(vae: VideoVAE, latents: Sequence[int], *, tiled: bool) -> int:
    """How many latent frames the VAE takes at a time of latents (B, z, T, h, w): all that CHUNK_BYTES allow.

    The frames are the same; on a CPU a small clip decodes four times as fast whole as frame by frame.
    """
    b, _, length, height, width = latents
    shape = (length, min(height, TILE[0]), min(width, TILE[1])) if tiled else (length, height, width)
    one, two = (decode_bytes(vae, shape, chunk=chunk) for chunk in (1, 2))
    return min(length, 1 + CHUNK_BYTES // max(1, b * (two - one)))


class Pipeline:
    """Clip and seeds -> frames.  The task follows from the network and from the pictures of the Clip.

    Modules may be anywhere: they come to the device as `offload` says.  tiled: the VAE works tile by tile.
    ode: a student follows its velocity, without fresh noise.
    """

    def __init__(
        self,
        models: Models,
        sampling: Sampling,
        *,
        device: torch.device,
        offload: Offload = "none",
        tiled: bool = False,
        ode: bool = False,
    ):
        self.models, self.sampling, self.device = models, sampling, device
        self.tiled, self.ode = tiled, ode
        self.times = sampling_times(sampling)
        self.residence = Residence(device, offload)
        out = models.network.config["out_channels"]
        if models.vae.latent_channels != out:
            raise UserError(
                f"the VAE has {models.vae.latent_channels} latent channels but the network makes {out}: pass "
                "the vae= that belongs to it."
            )

    @torch.no_grad()
    def __call__(
        self, clip: Clip, seeds: Sequence[int], *, on_progress: OnProgress | None = None
    ) -> Generated:
        """Sample j depends on prompt j, seed j and the pictures, not on the rest of the batch."""
        watch = Watch(self.device, on_progress)
        try:
            latents = self.denoise(self.encode(clip, watch), seeds, watch)
            return Generated(self.decode(latents, watch), watch.seconds)
        finally:
            self.residence.release()

    @torch.no_grad()
    def encode(self, clip: Clip, watch: Watch) -> Encoded:
        """Texts and pictures, once for any number of seeds."""
        vae = self.models.vae
        check_frames(clip.frames)
        check_size(clip.size, vae.spatial_factor * PATCH[-1])
        self._check_pictures(clip)
        shape = latent_shape(vae, clip.frames, clip.size)
        with watch.stage("text"):
            context, negative = self._texts(clip)
        return Encoded(shape=shape, context=context, negative=negative, **self._known(clip, shape, watch))

    @torch.no_grad()
    def denoise(self, encoded: Encoded, seeds: Sequence[int], watch: Watch) -> Tensor:
        """Latents (B, z, T, h, w), one per seed."""
        if len(encoded.context) not in (1, len(seeds)):
            raise UserError(
                f"got {len(encoded.context)} prompts and {len(seeds)} seeds: give one prompt, or as many."
            )
        models, sampling = self.models, self.sampling
        noise = SampleNoise(seeds, encoded.shape, device=self.device)
        experts = {"network": partial(self._run, models.network)}
        if models.network_low is not None:
            experts |= {"network_low": partial(self._run, models.network_low), "boundary": sampling.boundary}
        known = {name: value for name, value in vars(encoded).items() if name != "shape"}
        rules = {name: getattr(sampling, name) for name in ("guidance", "guidance_low", "timesteps")}
        denoiser = Denoiser(**experts, **known, **rules)
        with watch.stage("denoise", len(self.times) - 1) as report:
            start = noise.draw()
            if sampling.student:
                return sample_rcm(denoiser, start, self.times, noise.draw, ode=self.ode, on_step=report)
            return TEACHERS[sampling.sampler](denoiser, start, self.times, on_step=report)

    @torch.no_grad()
    def decode(self, latents: Tensor, watch: Watch) -> Tensor:
        """Frames (B, 3, F, H, W) fp32 in [-1, 1]."""
        vae, done = self.models.vae, 0
        with watch.stage("decode", 1 + (latents.shape[2] - 1) * vae.temporal_factor) as report:

            def on_frames(piece: Tensor) -> None:
                nonlocal done
                done += piece.shape[2]
                report(done)

            self.residence.use(vae)
            chunk = vae_chunk(vae, latents.shape, tiled=self.tiled)
            if self.tiled:
                return decode_tiled(vae, latents, chunk=chunk)
            return vae.decode(latents, chunk=chunk, on_frames=on_frames)

    def _run(self, network: WanModel, *inputs: Tensor, **known: Tensor | None) -> Tensor:
        """The forward of a network that is fetched first."""
        self.residence.use(network, network.shard_units())
        return network(*inputs, **known)

    def _texts(self, clip: Clip) -> tuple[Tensor, Tensor | None]:
        """Context (B, S, E), and the negative prompt's (1, S, E) where guidance needs it."""
        sampling = self.sampling
        guided = sampling.guidance != 1 or (sampling.guidance_low or 1) != 1
        negative = sampling.negative_prompt if clip.negative is None else clip.negative
        texts = [*clip.prompts, negative] if guided else list(clip.prompts)
        encoder = self.models.text_encoder
        self.residence.use(encoder)
        # each alone: a batch is padded to its longest text, which would show in the last bits
        context = torch.cat([encoder([text]) for text in texts])
        return (context[:-1], context[-1:]) if guided else (context, None)

    def _check_pictures(self, clip: Clip) -> None:
        tokens = self.models.network.config["clip_tokens"]
        if tokens and clip.image is None:
            raise UserError("this network continues a picture: give it an image.")
        if tokens and self.models.image_encoder is None:
            raise UserError("this network needs the CLIP image encoder.")
        if (clip.last_image is not None) != (tokens > CLIP_TOKENS):
            raise UserError("a first-last-frame network needs two pictures, any other at most the first.")

    def _known(self, clip: Clip, shape: Sequence[int], watch: Watch) -> dict[str, Tensor]:
        """What the network is told about the pictures, under Encoded's names; shape is the latents'."""
        models, config = self.models, self.models.network.config
        channels = config["in_channels"] - models.vae.latent_channels
        if clip.image is None:
            # where pictures could be, their absence is all zero, mask included
            return {"condition": torch.zeros(1, channels, *shape[1:], device=self.device)} if channels else {}
        with watch.stage("image"):
            pictures = [each.to(self.device) for each in (clip.image, clip.last_image) if each is not None]
            self.residence.use(models.vae)
            if not channels:
                return {"first_frame": self._encode(pictures[0].unsqueeze(2))}
            latents = self._encode(known_frames(pictures[0], clip.frames, *pictures[1:]))
            known = {"condition": condition(latents, has_last=len(pictures) > 1)}
            if config["clip_tokens"]:
                self.residence.use(models.image_encoder)
                known["clip"] = torch.cat([models.image_encoder(each) for each in pictures], dim=1)
            return known

    def _encode(self, frames: Tensor) -> Tensor:
        vae, (b, _, f, h, w) = self.models.vae, frames.shape
        chunk = vae_chunk(vae, (b, *latent_shape(vae, f, Size(w, h))), tiled=self.tiled)
        return encode_tiled(vae, frames, chunk=chunk) if self.tiled else vae.encode(frames, chunk=chunk)
