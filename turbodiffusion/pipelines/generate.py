"""The pipeline: text and pictures -> latents -> frames.  No files, no options, no printing.

Shapes: B samples, T latent and F pixel frames, z latent channels, S text tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from turbodiffusion.errors import UserError
from turbodiffusion.models.clip import ImageEncoder
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.models.vae_tiling import decode_tiled, encode_tiled
from turbodiffusion.models.wan import CLIP_TOKENS, PATCH, WanModel
from turbodiffusion.parallel import split_rows, split_tokens
from turbodiffusion.pipelines.conditioning import condition, known_frames
from turbodiffusion.pipelines.graphs import capture_cuda
from turbodiffusion.pipelines.memory import free_memory, vae_chunk
from turbodiffusion.pipelines.offload import Offload, Residence
from turbodiffusion.pipelines.schedule import TEACHERS, sampling_times
from turbodiffusion.pipelines.sizes import Size, check_frames, check_size, latent_frames
from turbodiffusion.pipelines.steps import Runner, Steps
from turbodiffusion.pipelines.texts import StoredTexts
from turbodiffusion.pipelines.watch import OnProgress, Watch, in_step
from turbodiffusion.samplers.denoiser import Denoiser
from turbodiffusion.samplers.few_step import sample_rcm
from turbodiffusion.samplers.noise import SampleNoise
from turbodiffusion.variants import Sampling


@dataclass(frozen=True, kw_only=True)
class Models:
    """What a pipeline runs.  network_low is the low-noise one of two experts; stored texts spare encoding."""

    network: WanModel
    vae: VideoVAE
    text_encoder: TextEncoder | StoredTexts
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


@dataclass(frozen=True)
class Generated:
    """frames (B, 3, F, H, W) fp32 in [-1, 1], and the seconds of each stage."""

    frames: Tensor
    seconds: dict[str, float]


def latent_shape(vae: VideoVAE, frames: int, size: Size) -> tuple[int, int, int, int]:
    """The latents of one clip: z, T, h, w."""
    height, width = size.height // vae.spatial_factor, size.width // vae.spatial_factor
    return vae.latent_channels, latent_frames(frames), height, width


class Pipeline:
    """Clip and seeds -> frames.  The task follows from the network and from the pictures of the Clip.

    Modules may be anywhere: they come to the device as `offload` says.  tiled: the VAE works tile by tile.
    ode: a student follows its velocity, without fresh noise.  graph: steps are recorded as a CUDA graph, kept
    for later clips of the same form.  compile: so are the networks' blocks, for good, by torch.compile.
    ranks: the processes that share the work from now on; each calls its pipeline of the same, all together.
    """

    def __init__(  # noqa: PLR0913 (the ways to run)
        self,
        models: Models,
        sampling: Sampling,
        *,
        device: torch.device,
        offload: Offload = "none",
        tiled: bool = False,
        ode: bool = False,
        graph: bool = False,
        compile: bool = False,
        ranks: dist.ProcessGroup | None = None,
    ):
        self.models, self.sampling, self.device = models, sampling, device
        self.tiled, self.ode, self.ranks = tiled, ode, ranks
        self.times = sampling_times(sampling)
        self.residence = Residence(device, offload)
        networks = {"network": models.network, "network_low": models.network_low}
        self.runners = {
            name: Runner(network, self.residence, capture_cuda if graph else None, compiled=compile)
            for name, network in networks.items()
            if network is not None
        }
        if ranks is not None:
            split_rows(models.vae, ranks)
            for runner in self.runners.values():
                split_tokens(runner.network, ranks)
        if compile:
            for runner in self.runners.values():
                for block in runner.network.shard_units():
                    block.compile()
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
            noise = self.noise(clip, seeds)
            latents = self.denoise(self.encode(clip, watch), seeds, watch, noise)
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
            context, negative = self._texts(clip, watch)
        return Encoded(shape=shape, context=context, negative=negative, **self._known(clip, shape, watch))

    def context(self, text: str, watch: Watch) -> Tensor:
        """(1, S, E) of one text."""

        def encode(encoder: TextEncoder) -> Tensor:
            self.residence.use(encoder, encoder.shard_units())
            return encoder([text])

        source = self.models.text_encoder
        if isinstance(source, StoredTexts):
            return source.context(text, encode, watch).to(self.device)
        return encode(source)

    def noise(self, clip: Clip, seeds: Sequence[int]) -> SampleNoise:
        """What the latents start from: drawn from now on, beside the encoding of the clip."""
        shape = latent_shape(self.models.vae, clip.frames, clip.size)
        noise = SampleNoise(seeds, shape, device=self.device)
        noise.begin()
        return noise

    @torch.no_grad()
    def denoise(
        self, encoded: Encoded, seeds: Sequence[int], watch: Watch, noise: SampleNoise | None = None
    ) -> Tensor:
        """Latents (B, z, T, h, w), one per seed; noise: theirs, if it has begun."""
        if len(encoded.context) not in (1, len(seeds)):
            raise UserError(
                f"got {len(encoded.context)} prompts and {len(seeds)} seeds: give one prompt, or as many."
            )
        sampling, noise = self.sampling, noise or SampleNoise(seeds, encoded.shape, device=self.device)
        experts = {name: Steps(runner, watch) for name, runner in self.runners.items()}
        experts |= {"boundary": sampling.boundary} if "network_low" in experts else {}
        # with a row for each seed, so that networks see the same tensors at every step
        known = {
            name: value if value is None else value.expand(len(seeds), *value.shape[1:])
            for name, value in vars(encoded).items()
            if name != "shape"
        }
        rules = {name: getattr(sampling, name) for name in ("guidance", "guidance_low", "timesteps")}
        denoiser = Denoiser(**experts, **known, **rules)
        with watch.stage("denoise", len(self.times) - 1) as report:
            start, report = noise.draw(), in_step(report, self.device)
            if sampling.student:
                return sample_rcm(denoiser, start, self.times, noise.draw, ode=self.ode, on_step=report)
            return TEACHERS[sampling.sampler](denoiser, start, self.times, on_step=report)

    @torch.no_grad()
    def decode(self, latents: Tensor, watch: Watch, take: Callable[[Tensor], None] | None = None) -> Tensor:
        """Frames (B, 3, F, H, W) fp32 in [-1, 1]; take gets them piece by piece, each when it is queued."""
        vae, done = self.models.vae, 0
        with watch.stage("decode", 1 + (latents.shape[2] - 1) * vae.temporal_factor) as report:

            def on_frames(piece: Tensor) -> None:
                nonlocal done
                done += piece.shape[2]
                report(done)
                if take is not None:
                    take(piece)

            self.residence.use(vae)
            self._make_room()
            chunk = self._chunk(latents.shape)
            if not self.tiled:
                return vae.decode(latents, chunk=chunk, on_frames=on_frames)
            frames = decode_tiled(vae, latents, chunk=chunk)
            on_frames(frames)
            return frames

    def _make_room(self) -> None:
        """Forget recordings where less than half of the device is free: decoding is fast with much memory."""
        if self.device.type == "cuda" and any(runner.recording for runner in self.runners.values()):
            free, total = torch.cuda.mem_get_info(self.device)
            if free < total / 2:
                for runner in self.runners.values():
                    runner.forget()
                torch.cuda.empty_cache()

    def _texts(self, clip: Clip, watch: Watch) -> tuple[Tensor, Tensor | None]:
        """Context (B, S, E), and the negative prompt's (1, S, E) where guidance needs it."""
        sampling = self.sampling
        guided = sampling.guidance != 1 or (sampling.guidance_low or 1) != 1
        negative = sampling.negative_prompt if clip.negative is None else clip.negative
        texts = [*clip.prompts, negative] if guided else list(clip.prompts)
        # each alone: a batch is padded to its longest text, which would show in the last bits
        context = torch.cat([self.context(text, watch) for text in texts])
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
        chunk = self._chunk((b, *latent_shape(vae, f, Size(w, h))))
        return encode_tiled(vae, frames, chunk=chunk) if self.tiled else vae.encode(frames, chunk=chunk)

    def _chunk(self, latents: Sequence[int]) -> int:
        """vae_chunk of such latents with what is free now."""
        free = None if self.device.type == "cpu" else free_memory(self.device).device
        return vae_chunk(self.models.vae, latents, tiled=self.tiled, free=free, ranks=self.ranks)
