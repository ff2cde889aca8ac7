"""Layers of the Wan transformer.  Every step that must run in fp32 says so here."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis: statistics in fp32, output in x's dtype."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = _widened(x)
        return F.rms_norm(y, self.weight.shape, self.weight.to(y.dtype), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Affine LayerNorm whose weights may be kept in fp32 beside bf16 activations."""

    def forward(self, x: Tensor) -> Tensor:
        y = _widened(x)
        weight, bias = self.weight.to(y.dtype), self.bias.to(y.dtype)
        return F.layer_norm(y, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def _widened(x: Tensor) -> Tensor:
    """x, in fp32 if it carries a tangent: on a GPU that of a bf16 norm would come out in fp32 by itself."""
    return x if unpack_dual(x).tangent is None else x.float()


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer applied in fp32, whatever dtype its weights are stored in."""
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of positions (...) at width / 2 frequencies, 1 to 1/10000 -> (..., width) fp32."""
    half = width // 2
    exponents = torch.arange(half, device=positions.device, dtype=torch.float64) / half
    angles = positions.double().unsqueeze(-1) * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()
