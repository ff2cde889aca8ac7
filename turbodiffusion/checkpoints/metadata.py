"""What our safetensors say about themselves, as JSON under one key of the header."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from turbodiffusion.attention import Attention
from turbodiffusion.errors import UserError
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.models.wan import WanModel
from turbodiffusion.variants import Sampling

KEY = "turbodiffusion"
KINDS = ("network", "vae", "text_encoder", "image_encoder")
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


def read_metadata(header: dict[str, str], path: Path) -> Metadata | None:
    """Our part of a safetensors header, or None.  Raises UserError if it can not be understood."""
    if KEY not in header:
        return None
    try:
        stored = json.loads(header[KEY])
        version = stored.pop("version")
        if version != VERSION:
            raise UserError(f"{path} has metadata version {version}, wanted {VERSION}; update the code")
        if stored["kind"] not in KINDS:
            raise UserError(f"{path} is of kind {stored['kind']!r}, this code reads {', '.join(KINDS)}")
        sampling = stored.pop("sampling", None)
        history = tuple(stored.pop("history", ()))
        return Metadata(**stored, sampling=sampling and Sampling(**sampling), history=history)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} carries metadata that can not be understood: {error}") from error


def class_of(kind: str) -> type[nn.Module]:
    """The class of a kind; the encoders' are imported when asked for: transformers takes seconds."""
    if kind == "network":
        return WanModel
    if kind == "vae":
        return VideoVAE
    if kind == "text_encoder":
        from turbodiffusion.models.text import TextEncoder

        return TextEncoder
    from turbodiffusion.models.clip import ImageEncoder

    return ImageEncoder


def kind_of(module: nn.Module) -> str:
    """One of KINDS; TypeError for any other module."""
    for kind in KINDS:
        if isinstance(module, class_of(kind)):
            return kind
    raise TypeError(f"{type(module).__name__} is no network, VAE or encoder")
