"""Whole families of models, random and minute, saved as a user would have them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from turbodiffusion import checkpoints
from turbodiffusion.models.clip import ImageEncoder
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.tokenizers import ByteTokenizer
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.models.wan import WanModel
from turbodiffusion.pipelines.options import Options, read
from turbodiffusion.variants import variants

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Family:
    """Files of one variant."""

    variant: str
    folder: Path

    def options(self, **changed: object) -> Options:
        """The defaults of infer.py on this family: 2 steps of 5 frames of 32x32 or so, and the changes."""
        cfg = OmegaConf.load(ROOT / "configs" / "infer.yaml")
        del cfg["defaults"], cfg["hydra"]
        files = {
            "ckpt": str(self.folder / "network.safetensors"),
            "vae": str(self.folder / "vae.safetensors"),
        }
        files["text_encoder"] = str(self.folder / "text.safetensors")
        if (clip := self.folder / "clip.safetensors").exists():
            files["image_encoder"] = str(clip)
        if (low := self.folder / "low.safetensors").exists():
            files["ckpt_low"] = str(low)
        small = {"prompt": "a cat", "steps": 2, "frames": 5, "size": "64x32", "out": str(self.folder / "out")}
        small["text_cache"] = "none"
        return replace(read(OmegaConf.merge(cfg, files, small)), **changed)


def awake(module: nn.Module) -> nn.Module:
    """Random weights that make a difference everywhere, the zero-initialised head included."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        scale = 0.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.02
        parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def tiny_vae(channels: int, patch: int) -> VideoVAE:
    statistics = {"latent_mean": [0.1] * channels, "latent_std": [0.5] * channels}
    sizes = {"base": 4, "multipliers": (1, 1, 1, 1), "res_blocks": 1}
    return awake(VideoVAE(latent_channels=channels, patch=patch, **sizes, **statistics))


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Makes the family of a variant once: its channels and tokens, but a network of two thin blocks."""
    made: dict[str, Family] = {}

    def make(name: str) -> Family:
        if name in made:
            return made[name]
        torch.manual_seed(0)
        folder, variant = tmp_path_factory.mktemp(name), variants()[name]
        thin = {"dim": 32, "ffn_dim": 48, "heads": 2, "layers": 2, "freq_dim": 32, "text_length": 24}
        sizes = {**variant.network, **thin}
        text_dim = sizes.get("text_dim", 4096)
        channels = sizes.get("out_channels", 16)
        # guidance in force, whatever the variant's own default
        sampling = replace(variant.sampling, guidance=3.0, size="64x32", frames=5, negative_prompt="dull")
        names = ("network", "low") if variant.experts else ("network",)
        for file in names:
            network = awake(WanModel(**sizes))
            if file == "low":
                network.head.head.weight.data.mul_(-1)
            checkpoints.save(folder / f"{file}.safetensors", network, sampling=sampling, variant=name)
        encoder = {"dim": text_dim, "ffn_dim": 8, "heads": 1, "head_dim": 8, "layers": 1}
        text = TextEncoder(tokenizer=ByteTokenizer(), length=24, vocab=259, **encoder)
        checkpoints.save(folder / "text.safetensors", awake(text))
        patch = 2 if variant.vae == "wan2.2" else 1
        checkpoints.save(folder / "vae.safetensors", tiny_vae(channels, patch))
        if sizes.get("clip_tokens"):
            tower = ImageEncoder(dim=1280, ffn_dim=8, heads=1, layers=1, patch=2, size=32)
            checkpoints.save(folder / "clip.safetensors", awake(tower))
        made[name] = Family(name, folder)
        return made[name]

    return make


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Path]:
    """Writes a noisy picture of some size and colour."""

    def write(name: str = "picture.png", size: tuple[int, int] = (64, 32), shade: int = 128) -> Path:
        noise = torch.randint(-40, 40, (size[1], size[0], 3), generator=torch.Generator().manual_seed(shade))
        Image.fromarray((noise + shade).clamp(0, 255).to(torch.uint8).numpy()).save(tmp_path / name)
        return tmp_path / name

    return write
