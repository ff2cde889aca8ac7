"""Sparse-linear attention (SLA, arXiv:2509.24006): exact where it matters most, linear over everything."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.reference import FEATURE_MAPS, block_map, linear_attention, sparse_attention
from turbodiffusion.errors import UserError


class ZeroLinear(nn.Module):
    """x W^T + b, zero at first.  Not an nn.Linear: a network initialises, and quantises, those of its own."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class SparseLinearAttention(nn.Module):
    """Softmax attention within the best blocks of keys, plus a projection of linear attention over all keys.

    q (B, N, L, D), k and v (B, N, S, D), one dtype -> (B, N, L, D); inputs may carry forward-mode tangents.
    For each block of queries the share `ratio` of the key blocks, at least one, is kept; the choice itself is
    not differentiated.  Untrained, the projection is zero and only the sparse part comes out.  Raises
    UserError for arguments that mean nothing; `config` holds them, but for head_dim.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        ratio: float = 0.1,
        block_q: int = 64,
        block_k: int = 64,
        feature_map: str = "softmax",
    ):
        super().__init__()
        if not 0 < ratio <= 1:
            raise UserError(f"got ratio={ratio} of the key blocks to keep, wanted more than 0 and at most 1")
        if min(block_q, block_k) < 1:
            raise UserError(f"got blocks of {block_q} queries and {block_k} keys, wanted at least one token")
        if feature_map not in FEATURE_MAPS:
            raise UserError(f"got feature_map={feature_map!r}, wanted one of {', '.join(FEATURE_MAPS)}")
        self.config = {
            "ratio": ratio,
            "block_q": block_q,
            "block_k": block_k,
            "feature_map": feature_map,
        }
        self.proj_l = ZeroLinear(head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = {"block_q": self.config["block_q"], "block_k": self.config["block_k"]}
        index = block_map(q, k, **blocks, ratio=self.config["ratio"])
        sparse, _ = sparse_attention(q, k, v, index, **blocks)
        linear = linear_attention(q, k, v, self.config["feature_map"])
        return sparse.to(q.dtype) + self.proj_l(linear.to(q.dtype))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config.items())
