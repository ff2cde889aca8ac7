"""Attention cores: modules that map q, k, v (B, N, L, D) to (B, N, L, D)."""

from turbodiffusion.attention.dense import DenseAttention
from turbodiffusion.attention.sparse_linear import SparseLinearAttention

__all__ = ["DenseAttention", "SparseLinearAttention"]
