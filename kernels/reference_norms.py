"""Plain-PyTorch twins of the fused norms, which round between steps as networks are trained to.

The kernels in kernels/norms_triton.py have the same names, and round once.  Shapes are in kernels/norms.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from kernels import fp8_linear, reference_int8
from kernels.reference import widen

EPS = 1e-6


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, in x's dtype."""
    return _modulate(x, shift, scale).to(x.dtype)


def norm_modulate_int8(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """reference_int8.quantise_rows of what norm_modulate gives, before that is rounded."""
    return reference_int8.quantise_rows(_modulate(x, shift, scale))


def norm_modulate_fp8(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """fp8_linear.quantise_plainly of what norm_modulate gives, before that is rounded."""
    return fp8_linear.quantise_plainly(_modulate(x, shift, scale))


def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm(x) times a weight, then channel pairs of every head turned, in x's dtype."""
    # on a GPU the tangent of a bf16 norm would come out in fp32 by itself
    y = x if unpack_dual(x).tangent is None else widen(x)
    y = F.rms_norm(y, weight.shape, weight.to(y.dtype), EPS).to(x.dtype)
    return rotate(y.unflatten(-1, (-1, 2 * cos.shape[-1])), cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (2j, 2j + 1) of x (B, L, N, D) by the table's angles; fp32 inside, x's dtype out."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y, in x's dtype."""
    return torch.addcmul(x, y, gate.to(x.dtype))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """In fp32, or fp64 for fp64 inputs."""
    return torch.addcmul(shift, widen(F.layer_norm(x, x.shape[-1:], eps=EPS)), 1 + scale)
