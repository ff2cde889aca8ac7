"""Attention cores: modules that map q, k, v (B, N, L, D) to (B, N, L, D)."""

from turbodiffusion.attention.dense import DenseAttention

__all__ = ["DenseAttention"]
