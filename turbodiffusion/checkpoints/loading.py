"""Checkpoints to modules: built on the meta device, then filled tensor by tensor, strictly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from turbodiffusion.checkpoints.detect import Checkpoint, open_kind
from turbodiffusion.checkpoints.locate import locate
from turbodiffusion.checkpoints.metadata import Report, empty_module
from turbodiffusion.checkpoints.quantised import BY_CHANNEL, NONE, settled
from turbodiffusion.checkpoints.sources import Entries
from turbodiffusion.errors import UserError
from turbodiffusion.models.int8 import to_eight_bits
from turbodiffusion.models.tokenizers import ByteTokenizer, FileTokenizer
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.models.wan import WanModel
from turbodiffusion.variants import Sampling, Variant
from turbodiffusion.variants import variant as named_variant

if TYPE_CHECKING:  # their modules import transformers, which takes seconds
    from turbodiffusion.models.clip import ImageEncoder
    from turbodiffusion.models.text import TextEncoder

Device = torch.device | str
Place = Callable[[str], tuple[Device, torch.dtype]]  # a tensor's name -> where and as what


@dataclass(frozen=True)
class LoadedNetwork:
    """A network and how it wants to be used; `variant.network` are the network's own sizes."""

    network: WanModel
    variant: Variant
    sampling: Sampling
    report: Report


def load_network(
    path: str | Path,
    *,
    device: Device,
    dtype: torch.dtype,
    variant: str | None = None,
    ema: bool = True,
    quant: str = NONE,
) -> LoadedNetwork:
    """The video transformer in any supported checkpoint; memory peaks at one copy of it plus one tensor.

    Norms and modulation stay fp32 whatever `dtype`.  `variant` settles what keys can not tell; `ema` takes
    the moving average from a training checkpoint that has both; `quant` none, int8, fp8 or auto: whether its
    linear layers are in 8 bits, which have no derivatives.  UserError for a file that does not fit.
    """
    checkpoint = open_kind(path, "network", variant=variant, ema=ema)
    report, row = checkpoint.report, known_variant(checkpoint.report)
    network = _filled(checkpoint, device, dtype, quant=settled(quant, report.quantised))
    return LoadedNetwork(network, replace(row, network=network.config), report.sampling, report)


def known_variant(report: Report) -> Variant:
    """A network's row of the table of models.  Raises UserError if nothing tells which it is."""
    if report.variant is None:
        choices = ", ".join(report.candidates) or "the one whose task and channels it shares"
        raise UserError(f"{report.path} does not say its variant; pass variant= with one of {choices}")
    return named_variant(report.variant)


def load_vae(path: str | Path, *, device: Device, dtype: torch.dtype) -> VideoVAE:
    """A VAE: ours, the published .pth or diffusers'.  Raises UserError for a file that does not fit."""
    return _filled(open_kind(path, "vae"), device, dtype)


def load_text_encoder(
    path: str | Path, *, device: Device, dtype: torch.dtype, tokenizer: str | Path | None = None
) -> TextEncoder:
    """A umT5 encoder.  Unless given, its tokenizer is looked for beside it; the byte-level one needs no file.

    Raises UserError for a file that does not fit.
    """
    checkpoint = open_kind(path, "text_encoder")
    if tokenizer is None and checkpoint.report.config.get("vocab") == ByteTokenizer.vocab:
        reader = ByteTokenizer()
    else:
        reader = FileTokenizer(tokenizer or locate("tokenizer", "umt5_xxl", Path(path)))
    return _filled(checkpoint, device, dtype, tokenizer=reader)


def load_image_encoder(path: str | Path, *, device: Device, dtype: torch.dtype) -> ImageEncoder:
    """A CLIP image tower.  Raises UserError for a file that does not fit."""
    return _filled(open_kind(path, "image_encoder"), device, dtype)


def _filled(
    checkpoint: Checkpoint, device: Device, dtype: torch.dtype, *, quant: str = NONE, **others: object
) -> nn.Module:
    """The checkpoint's module; others: arguments of its class that no checkpoint has."""
    report = checkpoint.report
    module = empty_module(report, **others)
    entries = checkpoint.floats(dtype) if quant == NONE else checkpoint.in_eight_bits(quant)
    if quant != NONE:
        to_eight_bits(module, report.eight_bit_layers, quant)
    fill(module, entries, report.path, lambda name: (device, kept_dtype(report.kind, name, dtype)))
    return module


def fill(module: nn.Module, entries: Entries, path: Path, place: Place) -> None:
    """Give a module built on the meta device its tensors, each at its `place`; one copy, read one by one."""
    check_fit(module, entries, path)
    state = {}
    for name, wanted in module.state_dict().items():
        device, dtype = place(name)
        if wanted.dtype in BY_CHANNEL:
            dtype = wanted.dtype
        # a copy, since what was read may be a window on the file
        state[name] = entries[name].load().to(device, dtype, copy=True)
    module.load_state_dict(state, strict=True, assign=True)


def kept_dtype(kind: str, name: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor becomes in a module of `dtype`: a network's norms and modulation stay fp32."""
    return torch.float32 if kind == "network" and WanModel.is_fp32(name) else dtype


def check_fit(module: nn.Module, entries: Entries, path: Path) -> None:
    """Raises UserError naming up to ten missing, unexpected and misfitting tensors each; reads none."""
    wanted = module.state_dict()
    misfits = [
        f"{name} {entry.shape} {entry.dtype} (wanted {tuple(wanted[name].shape)})"
        for name, entry in entries.items()
        if name in wanted
        and (entry.shape != tuple(wanted[name].shape) or not _becomes(entry.dtype, wanted[name].dtype))
    ]
    faults = {
        "missing": sorted(wanted.keys() - entries.keys()),
        "unexpected": sorted(entries.keys() - wanted.keys()),
        "misfitting": misfits,
    }
    if said := [f"{len(names)} {fault}: {', '.join(names[:10])}" for fault, names in faults.items() if names]:
        raise UserError(f"{path} does not fit {type(module).__name__}; {'; '.join(said)}")


def _becomes(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether numbers may be cast: to floats, but not to 8 bits, which count in a scale of their own."""
    return stored == wanted if wanted in BY_CHANNEL else stored.is_floating_point
