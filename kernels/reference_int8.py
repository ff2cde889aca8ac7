"""Plain-PyTorch twins of the kernels of 8-bit linear layers.

Sums are of integers and exact, and everything else is one IEEE operation after another, in fp32: kernels
that keep their order give the same bits on any machine, up to the GELU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import TINY


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., K) in steps of the 127th of each row's largest number -> int8 (..., K), steps (...) fp32."""
    x = x.float()
    step = x.abs().amax(-1, keepdim=True).clamp(min=TINY) * (1 / 127)
    return (x * step.reciprocal()).round().to(torch.int8), step.squeeze(-1)


def product(
    x: Tensor,
    x_step: Tensor,
    weight: Tensor,
    weight_step: Tensor,
    bias: Tensor | None,
    add: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    gelu: bool = False,
) -> Tensor:
    """x (M, K) times weight (N, K), each in its rows' steps, plus bias (N,) -> (M, N) fp32; tanh's GELU.

    gate (G, N): times it, a row of which belongs to M / G rows.  add (M, N): plus it.
    """
    # fp64 is exact too; on a GPU PyTorch multiplies integers of few shapes
    sums = x.double() @ weight.double().mT if x.is_cuda else torch._int_mm(x, weight.mT)
    y = sums.float() * x_step.unsqueeze(1) * weight_step
    if bias is not None:
        y = y + bias.float()
    if gelu:
        y = F.gelu(y, approximate="tanh")
    if gate is not None:
        y = y * gate.float().repeat_interleave(len(x) // len(gate), 0)
    return y if add is None else y + add.float()
