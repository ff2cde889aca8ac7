"""Attention cores: modules that map q, k, v (B, N, L, D) to (B, N, L, D)."""

from turbodiffusion.attention.choice import (
    DENSE,
    Attention,
    chosen,
    fastest,
    make_core,
    sparsity,
    spoken,
    trained,
)
from turbodiffusion.attention.dense import DenseAttention
from turbodiffusion.attention.sparse_linear import SPARSE_OPERATOR, SparseLinearAttention

__all__ = [
    "DENSE",
    "SPARSE_OPERATOR",
    "Attention",
    "DenseAttention",
    "SparseLinearAttention",
    "chosen",
    "fastest",
    "make_core",
    "sparsity",
    "spoken",
    "trained",
]
