"""MUSIQ (arXiv:2108.05997), which rates pictures of any size, as published for the ratings of SPAQ.

Shapes: B pictures, P patches of 32 x 32 pixels, E width.
"""

import re
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.backbones.pixels import padded, resize
from evaluation.backbones.vit import EPS, Block
from evaluation.backbones.weights import filled, read_state

_PATCH, _GRID = 32, 10
_LONGER = (224, 384)  # of the smaller scales


class StandardisedConv(nn.Conv2d):
    """Without bias; its kernels have mean 0 and deviation 1."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1):
        super().__init__(channels, out, kernel, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        x = padded(x, self.kernel_size, self.stride)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), stride=self.stride)


class Bottleneck(nn.Module):
    """(P, channels, 8, 8) -> (P, out, 8, 8)."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv1, self.gn1 = StandardisedConv(channels, channels, 1), _group_norm(channels)
        self.conv2, self.gn2 = StandardisedConv(channels, channels, 3), _group_norm(channels)
        self.conv3, self.gn3 = StandardisedConv(channels, out, 1), _group_norm(out)
        self.conv_proj, self.gn_proj = StandardisedConv(channels, out, 1), _group_norm(out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gn1(self.conv1(x)).relu()
        y = self.gn2(self.conv2(y)).relu()
        return (self.gn3(self.conv3(y)) + self.gn_proj(self.conv_proj(x))).relu()


class Musiq(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] -> ratings (B,), about 0 to 100."""

    def __init__(self, *, width: int = 384, layers: int = 14, stem: int = 64):
        super().__init__()
        self.conv_root, self.gn_root = StandardisedConv(3, stem, 7, 2), _group_norm(stem, EPS)
        self.block1 = Bottleneck(stem, 4 * stem)
        self.embedding = nn.Linear(4 * stem * (_PATCH // 4) ** 2, width)
        self.cls = nn.Parameter(torch.empty(1, 1, width))
        self.position_emb = nn.Parameter(torch.empty(1, _GRID**2, width))
        self.scale_emb = nn.Parameter(torch.empty(len(_LONGER) + 1, width))
        self.blocks = nn.Sequential(*(Block(width, 3 * width) for _ in range(layers)))
        self.encoder_norm = nn.LayerNorm(width, EPS)
        self.head = nn.Linear(width, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        x, (height, width) = 2 * pictures - 1, pictures.shape[-2:]
        scaled = [
            # Python's round, as upstream
            resize(x, tuple(round(side * longer / max(height, width)) for side in (height, width)), "bicubic")
            for longer in _LONGER
        ]
        # upstream pads the smaller scales with patches that no other attends to
        tokens = [self._tokens(each, scale) for scale, each in enumerate((*scaled, x))]
        x = torch.cat((self.cls.expand(len(x), 1, -1), *tokens), dim=1)
        return self.head(self.encoder_norm(self.blocks(x)[:, 0]))[:, 0]

    def _tokens(self, x: Tensor, scale: int) -> Tensor:
        """(B, P, E)."""
        x = padded(x, (_PATCH, _PATCH), (_PATCH, _PATCH))
        rows, columns = (length // _PATCH for length in x.shape[-2:])
        patches = F.unfold(x, _PATCH, stride=_PATCH).mT.reshape(-1, 3, _PATCH, _PATCH)
        y = self.gn_root(self.conv_root(patches)).relu()
        y = self.block1(F.max_pool2d(padded(y, (3, 3), (2, 2)), 3, 2)).permute(0, 2, 3, 1).flatten(1)
        places = _nearest(rows, x.device)[:, None] * _GRID + _nearest(columns, x.device)
        tokens = self.embedding(y).unflatten(0, (len(x), -1))
        return tokens + self.position_emb[0, places.flatten()] + self.scale_emb[scale]


def _group_norm(channels: int, eps: float = 1e-4) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps)


def _nearest(count: int, device: torch.device) -> Tensor:
    """Which of the 10 rows or columns of the grid each of so many is in."""
    grid = torch.arange(_GRID, dtype=torch.float32, device=device)
    return F.interpolate(grid[None, None], count, mode="nearest")[0, 0].long()


@lru_cache
def load_musiq(path: Path, device: torch.device) -> Musiq:
    """From a file of IQA-PyTorch's, whose projections are apart."""
    state = {}
    for name, x in read_state(path).items():
        name = re.sub(r"^transformer_encoder\.((posembed|scaleembed)_input\.)?", "", name)
        name = re.sub(r"^transformer\.encoderblock_", "blocks.", name)
        state[name.replace(".attention.out.", ".attn.proj.")] = x
    for name in [name for name in state if ".attention.query." in name]:
        parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("attention.query", "attn.qkv")] = torch.cat(parts)
    width, stem = (len(state[f"{layer}.bias"]) for layer in ("embedding", "gn_root"))
    layers = sum(name.endswith(".norm1.weight") for name in state)
    return filled(lambda: Musiq(width=width, layers=layers, stem=stem), state, path).to(device)
