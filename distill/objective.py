"""The seams of training: what is learned (Objective), from what (Data), and what comes out (Outcome)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar
from zlib import crc32

import torch
from torch import Tensor, nn

from turbodiffusion.variants import Sampling

Batch = TypeVar("Batch")
BatchIn = TypeVar("BatchIn", contravariant=True)
BatchOut = TypeVar("BatchOut", covariant=True)
Watch = Callable[[str, Tensor, Tensor], None]  # told a name, one number a sample (B,) and their times s (B,)


def unwatched(name: str, values: Tensor, times: Tensor) -> None:
    """A Watch that looks away."""


def seed_of(purpose: str, *numbers: int) -> int:
    """A generator's seed for one purpose of a run; 32 bits, all that PyTorch's CPU generator reads."""
    return crc32(",".join([purpose, *map(str, numbers)]).encode())


def everything(name: str) -> bool:
    """Names every parameter."""
    return True


def nothing(name: str) -> bool:
    """Names no parameter."""
    return False


class Objective(Protocol[BatchIn]):
    """A training algorithm: it knows diffusion, and no optimiser, file or rank."""

    networks: dict[str, nn.Module]  # by role; what trains
    averaged: tuple[str, ...]  # the roles whose averages are shown and shipped

    def turn(self, step: int) -> str:
        """The role whose optimiser moves at this step."""
        ...

    def losses(
        self, batch: BatchIn, step: int, rng: torch.Generator, watch: Watch
    ) -> Iterator[tuple[str, Tensor]]:
        """Named losses, one number a sample (B,), each to be differentiated before the next is asked for."""
        ...


class OneNetwork:
    """Networks and turns of an objective whose one network, the field called as its role, always trains."""

    role: ClassVar[str]

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {self.role: getattr(self, self.role)}

    @property
    def averaged(self) -> tuple[str, ...]:
        return (self.role,)

    def turn(self, step: int) -> str:
        return self.role


class Data(Protocol[BatchOut]):
    """An endless, seeded stream of batches that can be entered anywhere."""

    def batch(self, number: int) -> BatchOut:
        """Batch `number` of the stream: the same one whenever it is asked for."""
        ...


@dataclass(frozen=True)
class Product:
    """One file of a run's result: a module and what travels with it."""

    name: str  # of the file, without suffix
    module: nn.Module
    variant: str | None = None
    sampling: Sampling | None = None
    history: tuple[dict[str, object], ...] = ()  # of what it was made from
    keep_fp32: Callable[[str], bool] = everything  # the other parameters are stored in bf16


class Outcome(Protocol):
    """What a run shows and ships; `networks` are the averaged (EMA) weights by role."""

    def measure(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        """Numbers that say how good the networks are."""
        ...

    def verdict(self, measures: dict[str, float]) -> str | None:
        """One line on those numbers, for the end of a run; None where they say nothing."""
        ...

    def preview(self, networks: dict[str, nn.Module]) -> Tensor | None:
        """Clips to look at: (rows, columns, 3, F, H, W) in [-1, 1]; None if there are none."""
        ...

    def products(self, networks: dict[str, nn.Module]) -> list[Product]:
        """The checkpoints to write."""
        ...


@dataclass(frozen=True)
class Parts:
    """What a trainer needs."""

    objective: Objective
    data: Data
    outcome: Outcome
    context: int = 1  # how many ranks in a row share the tokens of a batch
