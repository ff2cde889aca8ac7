"""Attention cores: modules that map q, k, v (B, N, L, D) to (B, N, L, D)."""

from turbodiffusion.attention.choice import DENSE, Attention, chosen, make_core, spoken
from turbodiffusion.attention.dense import DenseAttention
from turbodiffusion.attention.sparse_linear import SparseLinearAttention

__all__ = [
    "DENSE",
    "Attention",
    "DenseAttention",
    "SparseLinearAttention",
    "chosen",
    "make_core",
    "spoken",
]
