"""Saving and resuming a run: one folder per checkpoint, whole or absent."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.precision import Masters
from turbodiffusion.errors import UserError


@dataclass
class TrainState:
    """Everything of a run that changes, but is no network: counters and the optimisers' moments.

    Noise, times and the order of the data follow from the seed and the step alone, so no generator is saved.
    """

    step: int = 0
    seconds: float = 0.0  # of training, over all sessions
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    updates: dict[str, int] = field(default_factory=dict)  # by role


def save_run(folder: Path, state: TrainState, networks: dict[str, nn.Module | Masters]) -> Path:
    """Write `folder/step-N` with networks (weights and averages by name), then drop the older ones."""
    partial, final = folder / "partial", folder / f"step-{state.step:07d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, network in networks.items():
        weights = {key: value.contiguous() for key, value in network.state_dict().items()}
        save_file(weights, partial / f"{name}.safetensors")
    torch.save(
        {
            "step": state.step,
            "seconds": state.seconds,
            "updates": state.updates,
            "optimizers": {role: optimizer.state_dict() for role, optimizer in state.optimizers.items()},
        },
        partial / "state.pt",
    )
    older = [path for path in saved_runs(folder) if path != final]
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for path in older:
        shutil.rmtree(path)
    return final


def saved_runs(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def resume_run(folder: Path, state: TrainState, networks: dict[str, nn.Module | Masters]) -> bool:
    """Put the newest checkpoint into state and networks; False if there is none.

    Raises UserError when it does not fit the networks that are to be trained.
    """
    found = saved_runs(folder)
    if not found:
        return False
    for name, network in networks.items():
        _load(network, found[-1] / f"{name}.safetensors")
    saved = torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True)
    state.step, state.seconds, state.updates = saved["step"], saved["seconds"], saved["updates"]
    for role, optimizer in state.optimizers.items():
        optimizer.load_state_dict(saved["optimizers"][role])
    return True


def _load(network: nn.Module | Masters, path: Path) -> None:
    weights: dict[str, Tensor] = load_file(path)
    wanted = {name: value.shape for name, value in network.state_dict().items()}
    wrong = sorted(name for name in wanted.keys() | weights.keys() if not _fits(wanted, weights, name))
    if wrong:
        raise UserError(
            f"{path} holds another network than this run trains ({', '.join(wrong[:10])}): "
            "give the run another name=, or remove its folder"
        )
    network.load_state_dict(weights)


def _fits(wanted: dict[str, torch.Size], weights: dict[str, Tensor], name: str) -> bool:
    return name in wanted and name in weights and wanted[name] == weights[name].shape
