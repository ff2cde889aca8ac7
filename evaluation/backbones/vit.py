"""Vision transformers with parameters named as timm does: DINO (arXiv:2104.14294), UMT (arXiv:2303.16058).

Sizes are read from the file; heads are 64 wide.  Shapes: B images, F frames, L tokens, E width.
"""

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.backbones.weights import filled, named, read_state
from turbodiffusion.checkpoints.sources import State

_HEAD = 64
EPS = 1e-6


class Attention(nn.Module):
    """Of all tokens to all."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, _HEAD)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and feed-forward, each after its norm; (B, L, E) to the same."""

    def __init__(self, width: int, hidden: int | None = None):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        wide, back = nn.Linear(width, hidden or 4 * width), nn.Linear(hidden or 4 * width, width)
        self.attn, self.mlp = Attention(width), named(fc1=wide, gelu=nn.GELU(), fc2=back)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _patches(width: int, patch: int) -> nn.Sequential:
    """Images (B, 3, H, W) -> (B, E, rows, columns); what is left at the right and below is dropped."""
    return named(proj=nn.Conv2d(3, width, patch, patch))


class Dino(nn.Module):
    """Images (B, 3, H, W) of any size -> the class token (B, E)."""

    def __init__(self, *, width: int, layers: int, patch: int, tokens: int):
        super().__init__()
        self.patch_embed = _patches(width, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, EPS)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        x = patches.flatten(2).mT + self._places(*patches.shape[-2:])
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), 1, -1)
        return self.norm(self.blocks(torch.cat((first, x), dim=1))[:, 0])

    def _places(self, rows: int, columns: int) -> Tensor:
        """(1, rows columns, E).  The published factor is off by 0.1, and where samples lie follows it."""
        grid = self.pos_embed[:, 1:].mT
        side = round(grid.shape[-1] ** 0.5)
        if (rows, columns) != (side, side):
            factor = tuple((length + 0.1) / side for length in (rows, columns))
            grid = F.interpolate(
                grid.unflatten(-1, (side, side)), scale_factor=factor, mode="bicubic"
            ).flatten(2)
        return grid.mT


class Umt(nn.Module):
    """Videos (B, F, 3, side, side) -> logits (B, classes)."""

    def __init__(self, *, width: int, layers: int, patch: int, tokens: int, classes: int):
        super().__init__()
        self.patch_embed = _patches(width, patch)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.fc_norm = nn.LayerNorm(width, EPS)
        self.head = nn.Linear(width, classes)

    def forward(self, videos: Tensor) -> Tensor:
        patches = self.patch_embed(videos.flatten(0, 1)).flatten(2).mT
        x = patches.unflatten(0, videos.shape[:2]).flatten(1, 2) + self.pos_embed
        return self.head(self.fc_norm(self.blocks(x).mean(dim=1)))


@lru_cache
def load_dino(path: Path, device: torch.device) -> Dino:
    """From a file of Meta's."""
    state = read_state(path)
    tokens = state["pos_embed"].shape[1]
    return filled(lambda: Dino(tokens=tokens, **_sizes(state)), state, path).to(device)


@lru_cache
def load_umt(path: Path, device: torch.device, frames: int = 16) -> Umt:
    """From a file of UMT's, whose keys have no bias; like upstream, whether or not it has places, or more."""
    parts = ("patch_embed.", "pos_embed", "blocks.", "fc_norm.", "head.")
    state = {name: x for name, x in read_state(path).items() if name.startswith(parts)}
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].squeeze(2)  # of one frame
    for name in [name for name in state if name.endswith(".q_bias")]:
        q, v = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
        state[name.replace("q_bias", "qkv.bias")] = torch.cat((q, torch.zeros_like(q), v))
    sizes = _sizes(state)
    state.setdefault("pos_embed", _waves(frames, 14 * 14, sizes["width"]))
    tokens, classes = state["pos_embed"].shape[1], len(state["head.bias"])
    return filled(lambda: Umt(tokens=tokens, classes=classes, **sizes), state, path).to(device)


def _sizes(state: State) -> dict[str, int]:
    width, *_, patch = state["patch_embed.proj.weight"].shape
    return {"width": width, "layers": sum(name.endswith(".norm1.weight") for name in state), "patch": patch}


def _waves(frames: int, cells: int, width: int, trained: int = 8) -> Tensor:
    """Sines and cosines (1, frames cells, width) of places in time and space, stretched in time alone."""
    place = torch.arange(trained * cells, dtype=torch.float64)[:, None]
    angle = place / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    waves = torch.stack((angle.sin(), angle.cos()), dim=-1).float()  # (places, width / 2, 2)
    waves = waves.view(trained, cells * width).T[None]
    return F.interpolate(waves, frames, mode="linear")[0].T.reshape(1, frames * cells, width)
