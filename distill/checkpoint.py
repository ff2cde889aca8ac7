"""Saving and resuming a run: one folder per checkpoint, whole or absent.

Tensors are stored by torch.distributed.checkpoint, every rank its shards: a run may be resumed on any number.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from distill import replicas
from turbodiffusion.errors import UserError

ALONE = "torch.distributed is disabled"  # a warning of torch's, where there is one process
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


class Saver:
    """Writes the checkpoints of a run into `folder`, one at a time; every rank must ask for each.

    In the background: everything is copied to the host's memory, and written while training goes on.
    Raises UserError, on every rank, when one can not be written; those before it stay whole.
    """

    def __init__(self, folder: Path, *, background: bool = False):
        self.folder, self.background = folder, background
        self.thread = ThreadPoolExecutor(1)  # a process that ends waits for it
        self.under_way: Future[None] | None = None
        # a group of its own: what is sent in the background must not meet what training sends
        several = background and dist.is_initialized()
        self.ranks = dist.new_group(backend="gloo") if several else None

    def save(self, state: TrainState, networks: Networks) -> None:
        """Write `folder/step-N`, unless it is there, then drop the older ones."""
        self.wait()
        final = self.folder / f"step-{state.step:07d}"
        if final.exists():  # saved when the run stopped here before
            return
        # for good: it may come from another thread at any time
        warnings.filterwarnings("ignore", ALONE)
        tensors, path = _weights(networks) | _moments(state, networks), final.with_name("partial")
        with _explained(final):
            if replicas.rank() == 0:
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir(parents=True)
                counters = {"step": state.step, "seconds": state.seconds, "updates": state.updates}
                (path / "counters.json").write_text(json.dumps(counters))
        replicas.wait()
        if self.background:
            written = dcp.async_save(tensors, checkpoint_id=path, process_group=self.ranks)
            self.under_way = self.thread.submit(_complete, final, written.result)
        else:
            _complete(final, partial(dcp.save, tensors, checkpoint_id=path))
            replicas.wait()

    def check(self) -> None:
        """Raise what has gone wrong in the background by now."""
        if self.under_way is not None and self.under_way.done():
            self.under_way.result()

    def wait(self) -> None:
        """Until what is under way is a checkpoint; raises what goes wrong."""
        if self.under_way is not None:
            self.under_way.result()
            self.under_way = None
            replicas.wait()


def _complete(final: Path, write: Callable[[], object]) -> None:
    """Write, give it its name, and drop what is older."""
    with _explained(final):
        write()
        if replicas.rank() == 0:
            older = saved_runs(final.parent)
            final.with_name("partial").rename(final)
            for path in older:
                shutil.rmtree(path)


@contextmanager
def _explained(final: Path) -> Iterator[None]:
    """Say of a checkpoint that can not be written where that was and why, and leave nothing of it."""
    try:
        yield
    except (CheckpointException, OSError) as error:
        if replicas.rank() == 0:
            shutil.rmtree(final.with_name("partial"), ignore_errors=True)
        reason = getattr(_reason(error), "strerror", None) or _reason(error)
        raise UserError(
            f"{final} could not be written ({reason}): make room there, or choose another place with out=; "
            "the checkpoint before it is whole"
        ) from error


def saved_runs(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def resume_run(folder: Path, state: TrainState, networks: Networks) -> bool:
    """Put the newest checkpoint into state and networks, in place; False if there is none.

    Raises UserError when it does not fit the networks that are to be trained, or what trains them.
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
    _check_moments(stored.keys(), tensors.keys(), found[-1])
    with _plainly():
        dcp.load(tensors, checkpoint_id=found[-1])
    counters = json.loads((found[-1] / "counters.json").read_text())
    state.step, state.seconds, state.updates = (counters[name] for name in ("step", "seconds", "updates"))
    return True


@contextmanager
def _plainly() -> Iterator[None]:
    """Leave out of torch's checkpoints its warning where there is one process, and its wrapper of errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ALONE)
        try:
            yield
        except CheckpointException as error:
            raise _reason(error) from error


def _reason(error: Exception) -> BaseException:
    """Of the ranks whose failures torch wraps, the first one's."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


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


def _check_moments(stored: Set[str], wanted: Set[str], path: Path) -> None:
    if not wanted <= stored:
        weight = f"{min(wanted - stored).rpartition('/')[0]}/"
        theirs, ours = (
            ", ".join(sorted(name.removeprefix(weight) for name in names if name.startswith(weight)))
            for names in (stored, wanted)
        )
        raise UserError(
            f"{path} was made with another optimiser: of some weights it holds {theirs}, and this run wants "
            f"{ours}; set matrices= and betas= of optims to what they were, or give the run another name="
        )


def _check(stored: dict[str, torch.Size], weights: dict[str, Tensor], path: Path) -> None:
    wanted = {name: value.shape for name, value in weights.items()}
    names = {name for name in stored if not name.startswith("optimizer/")} | wanted.keys()
    wrong = sorted(name for name in names if wanted.get(name) != stored.get(name))
    if wrong:
        raise UserError(
            f"{path} holds another network than this run trains ({', '.join(wrong[:10])}): "
            "give the run another name=, or remove its folder"
        )
