"""Which models are on the device now: all of them, one at a time, or one block at a time.

The copy in host memory stays the master: leaving the device drops the device's copy, nothing is copied back.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from turbodiffusion.errors import UserError

Offload = Literal["none", "stage", "block"]
ALIGNMENT = 512


def check_offload(name: str) -> Offload:
    """The name, if it is one of the three."""
    for choice in get_args(Offload):
        if name == choice:
            return choice
    raise UserError(f"offload={name} is not one of {', '.join(get_args(Offload))}.")


class Residence:
    """Brings models to the device when they are used.

    none: each comes at its first use and stays.  stage: using one sends the others home, so that two large
    ones (two experts, say) are never there together.  block: like stage, and a model's `shard_units` come and
    go one by one while it runs, the next one on its way during the present one's work.
    """

    def __init__(self, device: torch.device, mode: Offload = "none"):
        self.device, self.mode = device, mode
        self._present: list[nn.Module] = []
        self._leave = ExitStack()

    def use(
        self,
        model: nn.Module,
        units: Sequence[nn.Module] = (),
        *,
        on_leave: Callable[[], object] | None = None,
    ) -> None:
        """Make the model runnable on the device; units are its parts that block mode streams.

        on_leave is called when its weights lose their place there.
        """
        if model in self._present:
            return
        if self.mode == "none":
            model.to(self.device)
        else:
            self.release()
            if on_leave is not None:
                self._leave.callback(on_leave)
            streamed = units if self.mode == "block" else ()
            inside = {id(tensor) for unit in streamed for tensor in _tensors(unit)}
            home = [(tensor, tensor.data) for tensor in _tensors(model) if id(tensor) not in inside]
            self._leave.callback(_point, home)
            _point((tensor, data.to(self.device)) for tensor, data in home)
            if streamed:
                self._leave.callback(BlockStream(streamed, self.device).close)
        self._present.append(model)

    def release(self) -> None:
        """Send home what stage and block brought."""
        self._leave.close()
        if self.mode != "none":
            self._present.clear()


class BlockStream:
    """Streams units, which run in the given order again and again, through the device.

    They take turns in two places there: one holds the unit that runs, the other receives the next.  Host
    copies are pinned where the device can copy on its own.
    """

    def __init__(self, units: Sequence[nn.Module], device: torch.device):
        self.device = device
        self.backend = torch.get_device_module(device)
        self.is_async = device.type != "cpu" and hasattr(self.backend, "Stream")
        self.side = self.backend.Stream(device=device) if self.is_async else None
        self.home = [[(tensor, self._pinned(tensor)) for tensor in _tensors(unit)] for unit in units]
        # fixed places, not fresh allocations: those would grow as far as the host runs ahead of the device
        hosts = [[host for _, host in home] for home in self.home]
        size = max(_offsets(unit)[-1] for unit in hosts)
        memory = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        # views for each unit: not all need have the same layers in 8 bits
        self.places = [[_carved(whole, unit) for unit in hosts] for whole in memory]
        self.turn = 0
        self.arriving: int | None = None
        self.hooks = []
        for i, unit in enumerate(units):
            self.hooks.append(unit.register_forward_pre_hook(lambda *_, i=i: self._enter(i)))
            self.hooks.append(unit.register_forward_hook(lambda *_, i=i: _point(self.home[i])))

    def close(self) -> None:
        """Stop streaming; every unit is in host memory again."""
        for hook in self.hooks:
            hook.remove()
        for home in self.home:  # a unit may have failed while it ran
            _point(home)
        if self.is_async:  # the last fetch may still be writing to a place that is about to be freed
            self.backend.current_stream(self.device).wait_stream(self.side)
        self.places.clear()

    def _pinned(self, tensor: Tensor) -> Tensor:
        if self.is_async and not tensor.is_pinned():
            tensor.data = tensor.data.pin_memory()  # in place of the pageable copy, not beside it
        return tensor.data

    def _fetch(self, i: int) -> None:
        """Begin to copy unit i to the place whose turn it is not, once what ran there has finished."""
        self.arriving = i
        if self.is_async:
            self.side.wait_stream(self.backend.current_stream(self.device))
        with self.backend.stream(self.side) if self.is_async else nullcontext():
            for place, (_, host) in zip(self.places[1 - self.turn][i], self.home[i], strict=True):
                place.copy_(host, non_blocking=True)

    def _enter(self, i: int) -> None:
        if self.arriving != i:
            self._fetch(i)
        self.turn = 1 - self.turn
        _point(zip((tensor for tensor, _ in self.home[i]), self.places[self.turn][i], strict=True))
        if self.is_async:
            self.backend.current_stream(self.device).wait_stream(self.side)
        # nothing of this unit is queued yet: the copy waits for the one before it, and runs beside this one
        self._fetch((i + 1) % len(self.home))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _offsets(tensors: Sequence[Tensor]) -> list[int]:
    """Where each begins when they lie one after another, aligned as an allocator's, and where they end."""
    return list(accumulate((tensor.nbytes + -tensor.nbytes % ALIGNMENT for tensor in tensors), initial=0))


def _carved(memory: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Places for such tensors in one piece of memory (bytes,) uint8."""
    starts = zip(_offsets(like), like, strict=False)  # the last offset is the end
    return [memory[start : start + each.nbytes].view(each.dtype).view(each.shape) for start, each in starts]


def _point(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Have each tensor use this memory."""
    for tensor, data in pairs:
        tensor.data = data
