"""8-bit linear layers in a Wan transformer, for inference."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kernels import fp8_linear, int8_linear
from kernels.int8_linear import Tokens
from turbodiffusion.models.swap import swap

if TYPE_CHECKING:
    from turbodiffusion.models.wan import WanModel


class EightBitLinear(nn.Module):
    """nn.Linear with weights in 8 bits, which quantises tokens as they come and has no derivatives.

    x (..., in), or Tokens quantised before, -> (..., out) in x's dtype.  weight (out, in) counts in steps,
    scale (out,) fp32; bias (out,) is as it was.  gelu: tanh's GELU follows.  quantise: rows of floats to
    numbers and steps.
    """

    quantise: Callable[[Tensor], tuple[Tensor, Tensor]]

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, *, gelu: bool = False):
        super().__init__()
        self.gelu = gelu
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> EightBitLinear:
        """The nearest to a linear layer; of one on the meta device, one to load into."""
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(*cls.quantise(linear.weight.detach()), bias)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, gelu={self.gelu}"


class Int8Linear(EightBitLinear):
    """In int8, of even steps.

    add (B, L, out): add + gate times the outputs, gate (B or 1, L or 1, out).
    """

    quantise = staticmethod(int8_linear.quantise_rows)

    # a first call tries kernels on the device; there is nothing to fuse around them
    @torch.compiler.disable
    def forward(self, x: Tensor | Tokens, add: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        return int8_linear.int8_linear(
            x, self.weight, self.scale, self.bias, gelu=self.gelu, add=add, gate=gate
        )


class Fp8Linear(EightBitLinear):
    """In e4m3, of steps that grow with the number."""

    quantise = staticmethod(fp8_linear.quantise_rows)

    @torch.compiler.disable
    def forward(self, x: Tensor | Tokens) -> Tensor:
        return fp8_linear.fp8_linear(x, self.weight, self.scale, self.bias, gelu=self.gelu)


LINEARS: dict[str, type[EightBitLinear]] = {"int8": Int8Linear, "fp8": Fp8Linear}


def to_eight_bits(model: WanModel, layers: Collection[str] | None = None, quant: str = "int8") -> list[str]:
    """Quantise the linear layers of a network's blocks, or those named, where they are -> their names.

    These are most of its weights; embeddings, modulation, norms, the head and the linear branch of attention
    stay.  A state dict then has `X.weight` in 8 bits and fp32 `X.scale` under the names of before.
    """

    def match(name: str, child: nn.Module) -> bool:
        is_wanted = name.startswith("blocks.") if layers is None else name in layers
        return is_wanted and isinstance(child, nn.Linear)

    names = swap(model, match, LINEARS[quant].from_linear)
    for block in model.blocks:
        if isinstance(block.ffn[0], EightBitLinear):
            block.ffn[0].gelu = True
            block.ffn[1] = nn.Identity()
    return names
