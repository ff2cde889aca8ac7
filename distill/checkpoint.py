"""Saving and resuming a run: one folder per checkpoint, whole or absent.

Tensors are stored by torch.distributed.checkpoint, every rank its shards: a run may be resumed on any number.
"""

import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from distill import replicas
from turbodiffusion.errors import UserError

Networks = Mapping[str, Mapping[str, Tensor]]  # by role or role_ema, then by name


@dataclass
class TrainState:
    """Everything of a run that changes, but is no network: counters and the optimisers' moments.

    Noise, times and the order of the data follow from the seed and the step alone, so no generator is saved.
    """

    step: int = 0
    seconds: float = 0.0  # of training, over all sessions
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    updates: dict[str, int] = field(default_factory=dict)  # by role


def save_run(folder: Path, state: TrainState, networks: Networks) -> Path:
    """Write `folder/step-N`, unless it is there, then drop the older ones; every rank must ask for it.

    Raises OSError, on every rank, when it can not be written.
    """
    partial, final = folder / "partial", folder / f"step-{state.step:07d}"
    if final.exists():  # saved when the run stopped here before
        return final
    if replicas.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    replicas.wait()
    tensors = _weights(networks) | _moments(state, networks)
    with _plainly():
        dcp.save(tensors, checkpoint_id=partial)
    if replicas.rank() == 0:
        counters = {"step": state.step, "seconds": state.seconds, "updates": state.updates}
        (partial / "counters.json").write_text(json.dumps(counters))
        older = saved_runs(folder)
        partial.rename(final)
        for path in older:
            shutil.rmtree(path)
    replicas.wait()
    return final


def saved_runs(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def resume_run(folder: Path, state: TrainState, networks: Networks) -> bool:
    """Put the newest checkpoint into state and networks, in place; False if there is none.

    Raises UserError when it does not fit the networks that are to be trained.
    """
    found = saved_runs(folder)
    if not found:
        return False
    stored = dcp.FileSystemReader(found[-1]).read_metadata().state_dict_metadata
    weights = _weights(networks)
    _check({name: value.size for name, value in stored.items()}, weights, found[-1])
    with_moments = {name.rpartition("/")[0] for name in stored}
    for role, optimizer in state.optimizers.items():
        moved = [p for name, p in networks[role].items() if _moment(role, name) in with_moments]
        _make_moments(optimizer, moved)
    tensors = weights | _moments(state, networks)
    with _plainly():
        dcp.load(tensors, checkpoint_id=found[-1])
    counters = json.loads((found[-1] / "counters.json").read_text())
    state.step, state.seconds, state.updates = (counters[name] for name in ("step", "seconds", "updates"))
    return True


@contextmanager
def _plainly() -> Iterator[None]:
    """Leave out of torch's checkpoints its warning where there is one process, and its wrapper of errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error


def _weights(networks: Networks) -> dict[str, Tensor]:
    return {
        f"{network}/{name}": value.detach()
        for network, values in networks.items()
        for name, value in values.items()
    }


def _moments(state: TrainState, networks: Networks) -> dict[str, Tensor]:
    return {
        f"{_moment(role, name)}/{kind}": value
        for role, optimizer in state.optimizers.items()
        for name, weight in networks[role].items()
        if weight in optimizer.state
        for kind, value in optimizer.state[weight].items()
    }


def _moment(role: str, name: str) -> str:
    return f"optimizer/{role}/{name}"


def _make_moments(optimizer: torch.optim.Optimizer, weights: Iterable[Tensor]) -> None:
    """Have the optimiser make its state, to be overwritten like the weights, which it may move."""
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _check(stored: dict[str, torch.Size], weights: dict[str, Tensor], path: Path) -> None:
    wanted = {name: value.shape for name, value in weights.items()}
    names = {name for name in stored if not name.startswith("optimizer/")} | wanted.keys()
    wrong = sorted(name for name in names if wanted.get(name) != stored.get(name))
    if wrong:
        raise UserError(
            f"{path} holds another network than this run trains ({', '.join(wrong[:10])}): "
            "give the run another name=, or remove its folder"
        )
