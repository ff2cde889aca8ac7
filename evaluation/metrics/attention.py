"""How faithful a fast attention is to exact attention."""

import torch
from torch import Tensor
from torchmetrics import Metric

from turbodiffusion.errors import UserError


class AttentionFidelity(Metric):
    """Likeness and errors of flattened outputs, in fp64, for every layer, sampling step and head.

    cos_sim: their cosine.  relative_l1: sum |test - exact| / sum |exact|.  rmse: of their difference.
    """

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

    def cells(self) -> dict[str, Tensor]:
        """Each measure (layers, steps, heads), NaN where nothing was seen."""
        dot, x2, y2, error, size, square = self.sums.unbind(-1)
        return {
            "cos_sim": dot / (x2 * y2).sqrt(),
            "relative_l1": error / size,
            "rmse": (square / self.seen).sqrt(),
        }

    def compute(self) -> dict[str, Tensor]:
        """Each measure's mean over what was seen, and as `worst_` its worst."""
        there = self.seen > 0
        if not there.any():
            raise UserError("no attention was seen: compute after update")
        seen = {name: values[there] for name, values in self.cells().items()}
        worst = {f"worst_{name}": x.min() if name == "cos_sim" else x.max() for name, x in seen.items()}
        return {name: x.mean() for name, x in seen.items()} | worst
