"""Generation by the processes that torchrun starts: each video by all of them (cp), or each by one (data)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from turbodiffusion.errors import UserError
from turbodiffusion.parallel import joined, started
from turbodiffusion.pipelines.options import Options
from turbodiffusion.pipelines.request import Shot

MODES = ("none", "cp", "data")


def check_parallel(options: Options) -> None:
    """UserError for processes that would not share the work, or for none to share it."""
    mode, (_, count) = options.parallel, started()
    if mode not in MODES:
        raise UserError(f"parallel={mode} is not one of {', '.join(MODES)}.")
    if mode != "none" and options.evaluation is not None:
        raise UserError("evaluation= shares its prompts among processes by itself: leave parallel= away.")
    if mode != "none" and count == 1:
        raise UserError(f"parallel={mode} needs processes: torchrun --nproc-per-node=N infer.py ...")
    if mode == "none" and count > 1 and options.evaluation is None:
        raise UserError(f"{count} processes would all make the same: pass parallel=cp or parallel=data.")


def is_shared(options: Options) -> bool:
    """Whether processes share each video."""
    return options.parallel == "cp"


def together(options: Options, device: torch.device) -> AbstractContextManager[None]:
    """The processes know each other within, if they share a video."""
    return joined(device) if is_shared(options) else nullcontext()


def own_share(options: Options, shots: Sequence[Shot]) -> list[Shot]:
    """What this process makes of them: files in a row, since those of a prompt share its encoding."""
    if options.parallel != "data":
        return list(shots)
    (rank, count), files = started(), [path for shot in shots for path in shot.outputs.values()]
    own = set(files[len(files) * rank // count : len(files) * (rank + 1) // count])
    return only(shots, own.__contains__)


def only(shots: Sequence[Shot], is_wanted: Callable[[Path], bool]) -> list[Shot]:
    """The shots with those of their files."""
    left = [
        replace(shot, outputs={seed: path for seed, path in shot.outputs.items() if is_wanted(path)})
        for shot in shots
    ]
    return [shot for shot in left if shot.outputs]
