"""Muon: momentum whose update of a matrix is made orthogonal (K. Jordan et al., 2024; arXiv:2502.16982)."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from distill.sharding import cut, joined, local

# quintic iteration of the original publication: singular values end within 0.7 to 1.2, fast rather than exact
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """For matrices alone; those of one shape are made orthogonal together, in bf16 on a GPU.

    An update is scaled to the size that AdamW's has (arXiv:2502.16982, eq. 4): one learning rate and weight
    decay serve both.  Of sharded weights each rank makes all directions and keeps its part.  torch.optim.Muon
    does the same matrix by matrix, which a small network waits for, and not of sharded ones.
    """

    def __init__(self, matrices: Iterable[Tensor], *, lr: float, weight_decay: float):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[weight.shape].append(weight)
            for weights in alike.values():
                self._move(weights, group["lr"], group["weight_decay"])

    def _move(self, weights: list[Tensor], lr: float, weight_decay: float) -> None:
        parts, grads, momenta = (
            [local(tensor) for tensor in tensors]
            for tensors in (weights, [w.grad for w in weights], [self._momentum(w) for w in weights])
        )
        torch._foreach_lerp_(momenta, grads, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(grads, momenta, MOMENTUM)
        directions = orthogonal(torch.stack([joined(x, w) for x, w in zip(ahead, weights, strict=True)]))
        own = [cut(x, w) for x, w in zip(directions, weights, strict=True)]
        torch._foreach_mul_(parts, 1 - lr * weight_decay)
        size = 0.2 * max(weights[0].shape) ** 0.5
        torch._foreach_add_(parts, own, alpha=-lr * size)

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        return state["momentum"]


def orthogonal(matrices: Tensor) -> Tensor:
    """U V^T, nearly, of each U S V^T in (B, rows, columns), by Newton and Schulz's iteration."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)
