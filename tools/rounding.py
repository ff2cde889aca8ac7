"""Weights to 8 bits so that what a layer computes of what it reads is least off (GPTQ, arXiv:2210.17323).

Column after column is rounded, and the columns that are left make up for the error, as far as what the layer
reads in one channel tells of the others.  Numbers, steps and speed are those of rounding to the nearest.
"""

import torch
from torch import Tensor

from turbodiffusion.checkpoints.quantised import LINEARS, Quantise

# added to the diagonal, as a share of its mean: channels that were hardly read are no excuse for large errors
DAMPING = 0.01
# columns whose corrections are applied to the rest at once
BLOCK = 128


def round_jointly(weight: Tensor, products: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """weight (out, in) -> its numbers in the scheme, and steps (out,) as of rounding to the nearest.

    products (in, in): of every two channels that the layer reads, summed over tokens; on their device.
    """
    numbers, step = LINEARS[scheme].quantise(weight.to(products.device))
    limit = numbers.float().abs().max()
    left = weight.to(products.device).double() / step.double().unsqueeze(1)
    factors = _factors(products)
    for start in range(0, left.shape[1], BLOCK):
        columns = slice(start, start + BLOCK)
        part, off, own = left[:, columns], torch.empty_like(left[:, columns]), factors[columns, columns]
        for i in range(part.shape[1]):
            rounded = _nearest(part[:, i].clamp(-limit, limit), numbers.dtype)
            numbers[:, start + i] = rounded
            off[:, i] = (part[:, i] - rounded.double()) / own[i, i]
            part[:, i:] -= off[:, i : i + 1] * own[i, i:]
        left[:, columns.stop :] -= off @ factors[columns, columns.stop :]
    return numbers.to(weight.device), step.to(weight.device)


def _factors(products: Tensor) -> Tensor:
    """Upper triangular U, U^T U being the inverse of the products: how later columns make up for a column."""
    products = products.double().clone()
    products.diagonal().add_(DAMPING * products.diagonal().mean().clamp(min=1e-12))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(products)), upper=True)


def _nearest(counts: Tensor, dtype: torch.dtype) -> Tensor:
    return counts.float().to(dtype) if dtype.is_floating_point else counts.round().to(dtype)


def once(products: Tensor, by: Tensor | None, scheme: str) -> Quantise:
    """round_jointly of the first weight, for every later call too: it takes seconds.

    by (in,): what the channels of the products are divided by.
    """
    done: list[tuple[Tensor, Tensor]] = []

    def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
        if not done:
            divided = products if by is None else products / torch.outer(by, by).to(products.device)
            done.append(round_jointly(weight, divided, scheme))
        return done[0]

    return quantise
