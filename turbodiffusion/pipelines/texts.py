"""Contexts of texts, kept on disk: what was encoded before needs no encoder, the largest model to load."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbodiffusion.checkpoints.files import appearing
from turbodiffusion.errors import UserError
from turbodiffusion.models.text import TextEncoder, clean
from turbodiffusion.pipelines.watch import Watch


def cache_folder(asked: str) -> Path | None:
    """Where contexts are kept: a folder, the user's cache with auto, nowhere with none."""
    if asked == "none":
        return None
    if asked != "auto":
        return Path(asked).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turbodiffusion" / "texts"


@dataclass
class StoredTexts:
    """Contexts by text.  load is called when the first one is missing.

    identity: whatever else contexts depend on, such as the encoder's file.
    """

    load: Callable[[], TextEncoder]
    folder: Path
    identity: str

    @cached_property
    def encoder(self) -> TextEncoder:
        """Of the texts that are missing."""
        return self.load()

    def context(self, text: str, encode: Callable[[TextEncoder], Tensor], watch: Watch) -> Tensor:
        """(1, S, E) on the CPU or, if it is new, wherever encode made it."""
        key = hashlib.sha256(json.dumps([self.identity, clean(text)]).encode()).hexdigest()
        file = self.folder / f"{key}.safetensors"
        if (kept := _read(file)) is not None:
            return kept
        with watch.stage("loading"):
            encoder = self.encoder
        made = encode(encoder)
        try:
            _write(file, made)
        except (OSError, UserError) as error:
            warnings.warn(
                f"{error}: the text will be encoded again; text_cache=none keeps none", stacklevel=2
            )
        return made


def _read(file: Path) -> Tensor | None:
    """The context of a file; None where there is none, or a damaged one."""
    try:
        stored = load_file(file)
        rows, length = stored["context"], int(stored["length"])
    except (OSError, SafetensorError, KeyError):
        return None
    return F.pad(rows, (0, 0, 0, length - len(rows))).unsqueeze(0)


def _write(file: Path, context: Tensor) -> None:
    """Keep a context (1, S, E) without the zeros at its end."""
    rows = context[0].cpu()
    count = int(rows.any(dim=1).nonzero().max()) + 1 if rows.any() else 0
    with appearing(file) as part:
        save_file({"context": rows[:count].contiguous(), "length": torch.tensor(len(rows))}, part)
