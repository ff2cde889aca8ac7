"""What was found out about a checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import torch

from turbodiffusion.checkpoints.metadata import Metadata, Numbers
from turbodiffusion.checkpoints.sources import Entries
from turbodiffusion.errors import UserError
from turbodiffusion.variants import Sampling


@dataclass(frozen=True)
class Report:
    """What was found.  `reasons` says why, one sentence each; None means that nothing can tell."""

    path: Path
    kind: str  # network, vae, text_encoder, image_encoder
    format: str  # ours, wan, rcm, turbodiffusion, diffusers, dcp
    layout: str
    dtypes: dict[torch.dtype, tuple[int, int]]  # number of tensors and bytes, as stored
    reasons: tuple[str, ...]
    metadata: Metadata | None = None
    config: Numbers | None = None
    candidates: tuple[str, ...] = ()
    variant: str | None = None
    sampling: Sampling | None = None
    expert: str | None = None  # high or low
    quantised: bool = False


def shape_of(report: Report, entries: Entries, name: str, axes: int = 2) -> tuple[int, ...]:
    """The shape of a tensor that tells sizes; UserError if it is missing or has not that many axes."""
    if name not in entries or len(entries[name].shape) != axes:
        kind = f"a Wan {report.kind.replace('_', ' ')}"
        raise UserError(f"{report.path} looks like {kind} but its {name} is missing or not {axes}-D")
    return entries[name].shape
