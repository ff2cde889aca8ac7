"""What was found out about a checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import torch

from turbodiffusion.checkpoints.metadata import Metadata, Numbers
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
    sla: bool = False
