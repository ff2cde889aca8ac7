"""Plain-PyTorch twins of the steps between convolutions; the kernels in kernels/pixels_triton.py round once.

Shapes are in kernels/pixels.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """Each pixel's channels (B, C, ...) over their root mean square, rounded, times gamma (C, 1, ...)."""
    # accumulates in fp32 without an fp32 copy of x
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype)
    return (x * (x.shape[1] ** 0.5 / norm.clamp_min(EPS))).to(x.dtype) * gamma


def norm_silu(x: Tensor, bias: Tensor | None, gamma: Tensor, before: Tensor) -> Tensor:
    """SiLU of rms_norm(x + bias), after the frames before."""
    # rebinding frees what came before, where memory peaks
    x = F.silu(rms_norm(_biased(x, bias), gamma))
    return torch.cat([before, x], dim=2)


def add(x: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """x + bias + y."""
    return _biased(x, bias) + y


def enlarge(x: Tensor) -> Tensor:
    """Every pixel twice in height and width."""
    frames = x.transpose(1, 2).flatten(0, 1)
    frames = F.interpolate(frames, scale_factor=2.0, mode="nearest-exact")
    return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.view(-1, 1, 1, 1)
