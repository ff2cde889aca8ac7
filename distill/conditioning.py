"""What distillation trains on: clips, and everything that a network is told about them.

Shapes: B clips, C latent channels, T h w latent frames, height, width, S text tokens, E width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.data import EncodedClips
from distill.flow_matching import Captioned, condition
from distill.objective import Data, seed_of
from distill.replicas import teams
from distill.shard_files import read_context
from turbodiffusion.checkpoints import load_text_encoder, load_vae
from turbodiffusion.errors import UserError
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.tokenizers import PAD
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.samplers.denoiser import Denoiser


@dataclass(frozen=True)
class Example:
    """One batch of distillation.  has_clips: False where there are prompts alone, and latents is all zero."""

    latents: Tensor  # (B, C, T, h, w), normalised
    context: Tensor  # (B, S, E)
    condition: Tensor | None = None  # (B, channels, T, h, w)
    clip: Tensor | None = None  # (B, tokens, 1280)
    has_clips: bool = True

    def noise(self, rng: torch.Generator) -> Tensor:
        """N(0, 1) like the latents."""
        return torch.randn(self.latents.shape, generator=rng, device=self.latents.device)

    def view(self, network: nn.Module, timesteps: str) -> Denoiser:
        """velocity(x, s) of a network on the batch's prompts; timesteps: how it is told the time."""
        return Denoiser(
            network=network,
            context=self.context,
            condition=self.condition,
            clip=self.clip,
            timesteps=timesteps,
        )


@dataclass(frozen=True)
class Material:
    """All that a distillation needs beside its teacher."""

    train: Data[Example]
    shown: list[Example]  # what previews and measures are made for
    negative: Tensor | None  # (1, S, E)
    vae: VideoVAE | None  # to look at latents with; None: nothing can be shown


class Captions:
    """Captioned clips of the small world, as a network sees them; a share image_share shows its first frame.

    The mask and image channels are always there, and zero for the other clips.
    """

    def __init__(self, clips: Data[Captioned], text_encoder: TextEncoder, *, image_share: float, seed: int):
        self.clips, self.text_encoder, self.image_share, self.seed = clips, text_encoder, image_share, seed

    @torch.no_grad()
    def batch(self, number: int) -> Example:
        batch = self.clips.batch(number)
        generator = torch.Generator().manual_seed(seed_of("image", self.seed, number))
        has_image = torch.rand(len(batch.tokens), generator=generator) < self.image_share
        return Example(
            latents=batch.latents,
            context=self.text_encoder.encode(batch.tokens, batch.tokens != PAD),
            condition=condition(batch.image, has_image.to(batch.image.device)),
        )


@dataclass(frozen=True)
class SmallWorld:
    """Clips of the small world, encoded before training; its networks know the empty caption as negative."""

    clips: EncodedClips
    vae: str
    text_encoder: str
    image_share: float = 0.0

    def load(self, device: torch.device, dtype: torch.dtype, context: int) -> Material:
        vae = load_vae(self.vae, device=device, dtype=dtype)
        text_encoder = load_text_encoder(self.text_encoder, device=device, dtype=dtype)
        train, held_out = (
            Captions(clips, text_encoder, image_share=self.image_share, seed=self.clips.seed)
            for clips in self.clips.load(vae, text_encoder)
        )
        with torch.no_grad():
            negative = text_encoder([""])
        return Material(train, [held_out.batch(0)], negative, vae)


@dataclass(frozen=True)
class StoredClips:
    """Clips encoded beforehand; `shown` batches of them are shown, if there is a VAE to do so.

    negative is the file of an embedding (S, E), as python -m tools.make_data mode=negative makes it.
    """

    path: str | None
    shards: Callable[..., Data[Example]]
    negative: str | None = None
    vae: str | None = None
    shown: int = 0

    def load(self, device: torch.device, dtype: torch.dtype, context: int) -> Material:
        """Raises UserError for what is missing.  context: how many ranks in a row take the same batches."""
        if self.path is None:
            raise UserError("data.path= is missing: a folder of shards; python -m tools.make_data makes one")
        negative = None if self.negative is None else read_context(self.negative).unsqueeze(0).to(device)
        train = self.shards(path=self.path, device=device, every=teams(context))
        vae = None if self.vae is None else load_vae(self.vae, device=device, dtype=dtype)
        return Material(train, [train.batch(number) for number in range(self.shown)], negative, vae)
