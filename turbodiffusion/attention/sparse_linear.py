"""Sparse-linear attention (SLA, arXiv:2509.24006): exact where it matters most, linear over everything."""

import torch
from torch import Tensor, nn

from kernels.block_map import block_map
from kernels.block_sparse_int8 import are_differentiated
from kernels.block_sparse_linear import sparse_linear_attention
from kernels.reference import FEATURE_MAPS
from turbodiffusion.errors import UserError

# behind sparse_attention where its kernels run without a tangent
SPARSE_OPERATOR = torch.ops.turbodiffusion.sparse_attention.default


class SparseLinearAttention(nn.Module):
    """Softmax attention within the best blocks of keys, plus a projection of linear attention over all keys.

    q (B, N, L, D), k and v (B, N, S, D), one dtype -> (B, N, L, D); inputs may carry forward-mode tangents.
    For each block of queries the share `ratio` of the key blocks, at least one, is kept; the choice itself is
    not differentiated.  Untrained, the projection is zero and only the sparse part comes out.  int8: the
    softmax attention in 8 bits, which have no derivatives.  Raises UserError for arguments that mean nothing;
    `config` holds those that were trained with, so neither head_dim nor int8.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        ratio: float = 0.1,
        block_q: int = 64,
        block_k: int = 64,
        feature_map: str = "softmax",
        int8: bool = False,
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
        self.int8 = int8
        # no nn.Linear: a network initialises, and quantises, those of its own
        self.proj_l = nn.ParameterDict(
            {"weight": torch.zeros(head_dim, head_dim), "bias": torch.zeros(head_dim)}
        )

    # a first call tries kernels on the device; there is nothing to fuse around them
    @torch.compiler.disable
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = {"block_q": self.config["block_q"], "block_k": self.config["block_k"]}
        index = block_map(q, k, **blocks, ratio=self.config["ratio"])
        if self.int8 and are_differentiated(q, k, v):
            raise UserError(
                "attention=sla_int8 can not be trained: train with sla, and generate with sla_int8"
            )
        projected = (self.config["feature_map"], self.proj_l["weight"], self.proj_l["bias"])
        return sparse_linear_attention(q, k, v, index, *projected, **blocks, int8=self.int8)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in {**self.config, "int8": self.int8}.items())
