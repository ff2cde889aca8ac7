"""Training clips of the small world: rendered on the device, for the VAE, or encoded once, for the networks.

Shapes: B clips, F frames, H W pixels; T h w latents; S caption tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.flow_matching import Captioned
from distill.objective import seed_of
from distill.replicas import rank
from turbodiffusion.checkpoints.files import appearing
from turbodiffusion.errors import UserError
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.small_world.captions import PHRASINGS, caption
from turbodiffusion.small_world.clips import FRAMES, PIXELS, Scenes, draw_scenes, render
from turbodiffusion.small_world.sprites import Sprites, load_sprites

ENCODE_BATCH = 64
ENCODE_CHUNK = 8  # latent frames at a time: after the first, all of a clip's


@dataclass(frozen=True)
class Window:
    """How much of a rendered clip is used: its first frames, and a square at a place drawn per batch."""

    frames: int = FRAMES
    size: int = PIXELS

    def cut(self, clips: Tensor, generator: torch.Generator) -> Tensor:
        """(B, 3, 33, 128, 128) -> (B, 3, frames, size, size)."""
        top, left = torch.randint(PIXELS - self.size + 1, (2,), generator=generator).tolist()
        return clips[:, :, : self.frames, top : top + self.size, left : left + self.size]


@dataclass(frozen=True)
class RenderedClips:
    """Never-ending fresh clips (B, 3, F, H, W) in [-1, 1], rendered on the sprites' device."""

    sprites: Sprites
    count: int
    window: Window
    seed: int
    split: str = "train"

    def batch(self, number: int) -> Tensor:
        return self.draw(number, self.count)[1]

    def draw(self, number: int, count: int) -> tuple[Scenes, Tensor]:
        """Batch `number` of so many scenes, and their frames."""
        generator = torch.Generator().manual_seed(seed_of(self.split, self.seed, number))
        scenes = draw_scenes(count, generator, self.split)
        return scenes, self.window.cut(render(scenes, self.sprites), generator)


class Shuffle:
    """An endless stream over `size` samples, each exactly once an epoch, that can be entered anywhere."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self.orders: dict[int, Tensor] = {}

    def indices(self, start: int, count: int) -> Tensor:
        """Sample numbers (count,) at places start ... of the stream; a batch may straddle two epochs."""
        parts = []
        while count:
            epoch, offset = divmod(start, self.size)
            parts.append(self._order(epoch)[offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self.orders:
            generator = torch.Generator().manual_seed(seed_of("order", self.seed, epoch))
            self.orders = {epoch: torch.randperm(self.size, generator=generator)}
        return self.orders[epoch]


@dataclass(frozen=True)
class Encoded:
    """N clips as a network sees them."""

    triples: Tensor  # (N, 3) int64: subject, motion, background
    latents: Tensor  # (N, C, T, h, w) bf16
    image: Tensor  # alike: "first frame, then grey"


@torch.no_grad()
def encode_clips(clips: int, source: RenderedClips, vae: VideoVAE) -> Encoded:
    """Render and encode that many clips, on the VAE's device."""
    parts = []
    batches = range(-(-clips // source.count))
    for number in track(batches, f"encoding {clips} clips", disable=rank() > 0):
        scenes, frames = source.draw(number, min(source.count, clips - number * source.count))
        known = torch.zeros_like(frames)
        known[:, :, 0] = frames[:, :, 0]
        triples = torch.stack((scenes.subject, scenes.motion, scenes.background), dim=1)
        # the VAE may answer channels-last, which can not be saved
        encoded = [vae.encode(x, chunk=ENCODE_CHUNK).bfloat16().contiguous() for x in (frames, known)]
        parts.append((triples, *encoded))
    return Encoded(*(torch.cat(part) for part in zip(*parts, strict=True)))


class LatentClips:
    """Encoded clips on the device, each once an epoch, under one of its captions drawn anew each time."""

    def __init__(
        self, encoded: Encoded, text_encoder: TextEncoder, names: Sequence[str], *, count: int, seed: int
    ):
        self.encoded, self.count, self.seed = encoded, count, seed
        self.shuffle = Shuffle(len(encoded.latents), seed)
        self.device = encoded.latents.device
        kinds, kind = torch.unique(encoded.triples.cpu(), dim=0, return_inverse=True)
        texts = [
            caption(names[subject], motion, background, phrasing)
            for subject, motion, background in kinds.tolist()
            for phrasing in range(PHRASINGS)
        ]
        # tokens of every caption there can be (captions, S), and where each clip's begin
        self.tokens = text_encoder.tokenize(texts)[0].to(self.device)
        self.first_caption = (kind * PHRASINGS).to(self.device)

    def batch(self, number: int) -> Captioned:
        generator = torch.Generator().manual_seed(seed_of("captions", self.seed, number))
        phrasing = torch.randint(PHRASINGS, (self.count,), generator=generator)
        index = self.shuffle.indices(number * self.count, self.count)
        index, phrasing = (x.to(self.device, non_blocking=True) for x in (index, phrasing))
        return Captioned(
            latents=self.encoded.latents[index],
            image=self.encoded.image[index],
            tokens=self.tokens[self.first_caption[index] + phrasing],
        )


@dataclass(frozen=True)
class EncodedClips:
    """Which clips of the small world a network is trained and judged on.

    cache: a file to keep the encoded training clips in (150 KB a clip), or None.
    """

    window: Window
    count: int  # a batch
    seed: int
    clips: int = 32768
    held_out: int = 128
    cache: str | None = None

    def __post_init__(self):
        if min(self.clips, self.held_out) < 1:
            raise UserError(
                f"got clips={self.clips} and held_out={self.held_out}, wanted at least one of each"
            )

    def load(self, vae: VideoVAE, text_encoder: TextEncoder) -> tuple[LatentClips, LatentClips]:
        """The training clips, and held-out combinations in batches of all of them, on the VAE's device."""
        sprites = load_sprites().to(next(vae.parameters()).device)
        train, held_out = (
            RenderedClips(sprites, ENCODE_BATCH, self.window, self.seed, split)
            for split in ("train", "held_out_combinations")
        )
        return tuple(
            LatentClips(encoded, text_encoder, sprites.names, count=count, seed=self.seed)
            for encoded, count in (
                (self._cached(train, vae), self.count),
                (encode_clips(self.held_out, held_out, vae), self.held_out),
            )
        )

    def _cached(self, source: RenderedClips, vae: VideoVAE) -> Encoded:
        if self.cache is None:
            return encode_clips(self.clips, source, vae)
        key, file = f"{self.clips} {self.seed} {self.window} {_fingerprint(vae)}", Path(self.cache)
        if file.is_file():
            with safe_open(file, framework="pt") as opened:
                found = opened.metadata()
            if found == {"key": key}:
                return Encoded(**load_file(file, device=str(next(vae.parameters()).device)))
        encoded = encode_clips(self.clips, source, vae)
        with appearing(file) as part:
            save_file(vars(encoded), part, {"key": key})
        return encoded


def _fingerprint(vae: VideoVAE) -> int:
    """Changes with the VAE's weights."""
    weights = torch.cat([weight.detach().float().flatten() for weight in vae.parameters()])
    return crc32(weights.cpu().numpy().tobytes())
