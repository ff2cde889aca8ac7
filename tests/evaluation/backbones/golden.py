"""Weights and pictures that are the same everywhere."""

import zlib

import numpy as np
import torch
from torch import Tensor


def numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    """Normal, by a tensor's name alone; of a size that keeps activations within bounds."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return torch.from_numpy(drawn * np.float32(0.5 * np.prod(shape[1:]) ** -0.5))
    # of norms, their variances, and slopes of PReLU
    is_scale = name.endswith(("weight", "running_var"))
    return torch.as_tensor(0.1 * drawn + 0.5 * is_scale)


def pictures(frames: int, height: int, width: int) -> Tensor:
    """Slowly moving waves (F, H, W, 3) uint8."""
    t, y, x = (torch.linspace(0, 1, n, dtype=torch.float64) for n in (frames, height, width))
    rate = torch.tensor([3.0, 5.0, 8.0], dtype=torch.float64)
    phase = rate * (x[:, None] + 2 * y[:, None, None] + 0.1 * t[:, None, None, None])
    return (127.5 + 127 * torch.sin(2 * torch.pi * phase)).round().byte()
