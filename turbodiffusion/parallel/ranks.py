"""The processes that torchrun started; without it there is one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from turbodiffusion.errors import UserError


def started() -> tuple[int, int]:
    """This process's rank among those that torchrun started, and their number."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the other processes of torchrun, if it started this one, until the block is left.

    Of processes that fail only the first has its error; those that break off since it is gone end in silence.
    """
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    device_id = None if device.type == "cpu" else device
    store, own, count = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(count):
        # torchrun restarts with the store at hand, and the addresses of the processes that are gone
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend, store=store, rank=own, world_size=count, device_id=device_id)
    try:
        yield
    except BaseException as error:
        # the group is left as it is: to end it would be to wait for the others
        if not _is_first(store):
            raise SystemExit(1) from error
        raise
    dist.destroy_process_group()


def _is_first(store: dist.Store) -> bool:
    """Whether no other process has asked this."""
    try:
        return store.add("failed", 1) == 1
    except dist.DistError:  # the process that kept it is gone
        return False


def rank() -> int:
    """Of this process among those it has joined, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes have joined."""
    return dist.get_world_size() if dist.is_initialized() else 1


def neighbours(count: int) -> dist.ProcessGroup:
    """The group of `count` ranks in a row that this one is in; every rank must ask for it."""
    return dist.new_subgroups(count)[0]


def least(number: int, ranks: dist.ProcessGroup) -> int:
    """Of the numbers of a group's ranks."""
    numbers = [number] * ranks.size()
    dist.all_gather_object(numbers, number, group=ranks)
    return min(numbers)


def own_device(device: torch.device) -> torch.device:
    """Of an accelerator, this process's own: torchrun counts those that it starts on a machine.

    Raises UserError where there is none left.
    """
    if device.type == "cpu" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    index, count = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
    if index >= count:
        raise UserError(f"process {index + 1} here has no device, of which PyTorch sees {count}: start fewer")
    torch.accelerator.set_device_index(index)
    return torch.device(device.type, index)
