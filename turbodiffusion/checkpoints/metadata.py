"""What a checkpoint is: as our safetensors say about themselves, and as it was found out."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pkgutil import resolve_name

import torch
from torch import nn

from turbodiffusion.attention import Attention
from turbodiffusion.checkpoints.sources import Entries
from turbodiffusion.errors import UserError
from turbodiffusion.variants import Sampling

KEY = "turbodiffusion"  # of the header's entry that holds a Metadata as JSON
_CLASSES = {
    "network": "wan:WanModel",
    "vae": "vae:VideoVAE",
    "text_encoder": "text:TextEncoder",
    "image_encoder": "clip:ImageEncoder",
}
KINDS = tuple(_CLASSES)
VERSION = 1

Numbers = dict[str, int | list[int] | list[float] | list[bool] | Attention | None]


@dataclass(frozen=True)
class Metadata:
    """kind: one of KINDS; config: the arguments of its class; history: what was done to it, oldest first."""

    kind: str
    config: Numbers
    variant: str | None = None
    sampling: Sampling | None = None
    history: tuple[dict[str, object], ...] = ()
    format: str = "ours"  # whose names the tensors carry

    def header(self) -> dict[str, str]:
        """The safetensors header; `format` is what transformers wants to see there."""
        return {"format": "pt", KEY: json.dumps({"version": VERSION, **asdict(self)}, ensure_ascii=False)}


@dataclass
class Report:
    """What was found, filled step by step.  `reasons` says why, one sentence each.

    None means that nothing can tell.
    """

    path: Path
    kind: str  # one of KINDS
    format: str  # ours, wan, rcm, turbodiffusion, diffusers, dcp
    layout: str
    dtypes: dict[torch.dtype, tuple[int, int]]  # number of tensors and bytes, as stored
    reasons: list[str]
    metadata: Metadata | None = None
    config: Numbers | None = None  # of a text encoder less its tokenizer
    candidates: tuple[str, ...] = ()
    variant: str | None = None
    sampling: Sampling | None = None
    expert: str | None = None  # high or low
    linear: dict[str, int] = field(default_factory=dict)  # a network's layers to quantise, and their sizes
    quantised: dict[str, str] = field(default_factory=dict)  # those stored in 8 bits, and their scheme

    @property
    def history(self) -> tuple[dict[str, object], ...]:
        """What was done to it, as far as it says."""
        return self.metadata.history if self.metadata else ()

    @property
    def eight_bit_layers(self) -> list[str]:
        """The linear layers that have 8 bits when the network runs in 8 bits."""
        return list(self.quantised or self.linear)


def shape_of(report: Report, entries: Entries, name: str, axes: int = 2) -> tuple[int, ...]:
    """The shape of a tensor that tells sizes; UserError if it is missing or has not that many axes."""
    if name not in entries or len(entries[name].shape) != axes:
        kind = f"a Wan {report.kind.replace('_', ' ')}"
        raise UserError(f"{report.path} looks like {kind} but its {name} is missing or not {axes}-D")
    return entries[name].shape


def read_metadata(header: dict[str, str], path: Path) -> Metadata | None:
    """Our part of a safetensors header, or None.  Raises UserError if it can not be understood."""
    if KEY not in header:
        return None
    try:
        stored = json.loads(header[KEY])
        version, kind = stored.pop("version"), stored.get("kind")
        sampling, history = stored.pop("sampling", None), tuple(stored.pop("history", ()))
        if version == VERSION and kind in KINDS:
            return Metadata(**stored, sampling=sampling and Sampling(**sampling), history=history)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} carries metadata that can not be understood: {error}") from error
    raise UserError(
        f"{path} has metadata version {version} of a {kind}; this code reads version {VERSION} of a "
        f"{', '.join(KINDS)}: update it"
    )


def class_of(kind: str) -> type[nn.Module]:
    """The class of a kind; imported only now: with the encoders comes transformers, which takes seconds."""
    return resolve_name(f"turbodiffusion.models.{_CLASSES[kind]}")


def empty_module(report: Report, **others: object) -> nn.Module:
    """A checkpoint's module on the meta device; others: arguments of its class that no checkpoint has.

    Raises UserError if the checkpoint's config does not fit.
    """
    try:
        with torch.device("meta"):
            return class_of(report.kind)(**report.config, **others)
    except TypeError as error:
        raise UserError(f"{report.path} carries a config that does not fit this code: {error}") from error


def kind_of(module: nn.Module) -> str:
    """One of KINDS; TypeError for any other module."""
    for kind in KINDS:
        if isinstance(module, class_of(kind)):
            return kind
    raise TypeError(f"{type(module).__name__} is no network, VAE or encoder")
