"""How faithful a fast attention is to exact attention."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from turbodiffusion.errors import UserError


@dataclass(frozen=True)
class Fidelity:
    """cos_sim: of the flattened outputs.  relative_l1: sum |test - exact| / sum |exact|.  rmse: of the same.

    Every one is a tensor (layers, steps, heads), NaN where nothing was seen, or a number.
    """

    cos_sim: Tensor | float
    relative_l1: Tensor | float
    rmse: Tensor | float


class AttentionFidelity(Metric):
    """Sums in fp64 for every layer, sampling step and head, over all batches."""

    full_state_update = False
    is_differentiable = False

    sums: Tensor
    seen: Tensor

    def __init__(self, *, layers: int, steps: int, heads: int) -> None:
        super().__init__()
        cells = (layers, steps, heads)
        self.add_state("sums", torch.zeros(*cells, 6, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(cells, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, test: Tensor, exact: Tensor, *, layer: int, step: int) -> None:
        """Outputs (B, heads, L, D) of the attention on trial and of the exact one, for equal inputs."""
        if test.shape != exact.shape or test.ndim != 4 or test.shape[1] != self.seen.shape[2]:
            raise UserError(
                f"got outputs {tuple(test.shape)} and {tuple(exact.shape)}; "
                f"wanted two of (B, {self.seen.shape[2]}, L, D)"
            )
        x, y = (each.detach().double().to(self.sums.device) for each in (test, exact))
        terms = (x * y, x * x, y * y, (x - y).abs(), y.abs(), (x - y).square())
        self.sums[layer, step] += torch.stack([term.sum(dim=(0, 2, 3)) for term in terms], dim=-1)
        self.seen[layer, step] += x[:, 0].numel()

    def cells(self) -> Fidelity:
        """Of every layer, step and head."""
        dot, x2, y2, error, size, square = self.sums.unbind(-1)
        return Fidelity(dot / (x2 * y2).sqrt(), error / size, (square / self.seen).sqrt())

    def compute(self) -> dict[str, Fidelity]:
        """The mean and the worst over what was seen."""
        each = self.cells()
        there = self.seen > 0
        if not there.any():
            raise UserError("no attention was seen: compute after update")
        cos_sim, others = each.cos_sim[there], (each.relative_l1[there], each.rmse[there])
        return {
            "mean": Fidelity(*(float(values.mean()) for values in (cos_sim, *others))),
            "worst": Fidelity(float(cos_sim.min()), *(float(values.max()) for values in others)),
        }
