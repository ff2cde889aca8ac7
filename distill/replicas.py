"""Data-parallel training: every team of ranks takes its own batches, and all average the gradients.

A team is `context` ranks in a row, which share the tokens of a batch; 1: every rank is one.

`torchrun --nproc-per-node=N train.py ...` starts the ranks; without it there is one, and nothing here acts.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from turbodiffusion.parallel import rank, world_size


def teams(context: int = 1) -> int:
    """How many there are."""
    return world_size() // context


def numbers(step: int, count: int, context: int = 1) -> range:
    """The batches, of all that the teams take in turns, of which this rank's takes `count` at a step."""
    every = teams(context)
    return range(step * count * every + rank() // context, (step + 1) * count * every, every)


def average(tensors: Iterable[Tensor], context: int = 1) -> None:
    """Replace each gradient by its mean over the teams; all ranks must have the same ones.

    A team's is the sum of its ranks'.  Sharded gradients are left alone: FSDP has done that already.
    """
    tensors = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= teams(context)
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def from_first(values: list[float], device: torch.device) -> list[float]:
    """The first rank's numbers, on every rank."""
    if world_size() == 1:
        return values
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return shared.tolist()


def everyones(words: list[str]) -> list[str]:
    """The words of all ranks, each naming its rank where there are several."""
    if world_size() == 1:
        return words
    gathered: list[list[str] | None] = [None] * world_size()
    dist.all_gather_object(gathered, words)
    return [f"{word} on rank {i}" for i, said in enumerate(gathered) for word in said]


def wait() -> None:
    """Until every rank is here."""
    if world_size() > 1:
        dist.barrier()
