"""Data-parallel training: every rank holds everything, takes its own batches, and averages the gradients.

`torchrun --nproc-per-node=N train.py ...` starts the ranks; without it there is one, and nothing here acts.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the other processes of torchrun, if it started this one, until the block is left."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    dist.init_process_group(dist.get_default_backend_for_device(device), device_id=_device_id(device))
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def numbers(step: int, count: int) -> range:
    """The batches, of all that the ranks take in turns, of which this one takes `count` at a step."""
    every = world_size()
    return range(step * count * every + rank(), (step + 1) * count * every, every)


def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks; all must have the same ones.

    Sharded gradients are left alone: FSDP has averaged them already.
    """
    tensors = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
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


def _device_id(device: torch.device) -> torch.device | None:
    return None if device.type == "cpu" else device
