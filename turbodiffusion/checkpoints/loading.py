"""Checkpoints to modules: built on the meta device, then filled tensor by tensor, strictly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from turbodiffusion.attention import DenseAttention
from turbodiffusion.checkpoints.detect import Checkpoint, open_checkpoint
from turbodiffusion.checkpoints.encoders import sized_image_encoder, sized_text_encoder, sized_vae
from turbodiffusion.checkpoints.locate import locate
from turbodiffusion.checkpoints.report import Report
from turbodiffusion.checkpoints.sources import Entry
from turbodiffusion.errors import UserError
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.models.wan import WanModel
from turbodiffusion.variants import Sampling, Variant
from turbodiffusion.variants import variant as named_variant

if TYPE_CHECKING:  # their modules import transformers, which takes seconds
    from turbodiffusion.models.clip import ImageEncoder
    from turbodiffusion.models.text import TextEncoder

Module = TypeVar("Module", bound=nn.Module)
Place = Callable[[str], tuple[torch.device | str, torch.dtype]]  # a tensor's name -> where and as what


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
    device: torch.device | str,
    dtype: torch.dtype,
    core: Callable[[], nn.Module] = DenseAttention,
    variant: str | None = None,
    ema: bool = True,
) -> LoadedNetwork:
    """The video transformer in any supported checkpoint; memory peaks at one copy of it plus one tensor.

    Norms and modulation stay fp32 whatever `dtype`.  `variant` settles what keys can not tell; `ema` takes
    the moving average from a training checkpoint that has both.  UserError for a file that does not fit.
    """
    checkpoint = _open(path, "network", variant=variant, ema=ema)
    report = checkpoint.report
    if report.sla:
        raise UserError(
            f"{report.path} was tuned for SLA attention, which is not supported yet; "
            "run densely it would be another model"
        )
    if report.variant is None:
        choices = ", ".join(report.candidates) or "the one whose task and channels it shares"
        raise UserError(
            f"{report.path} does not say which variant it is; pass variant= with one of {choices}"
        )
    assert report.config
    assert report.sampling
    network = _build(
        lambda: WanModel(**report.config, core=core),
        checkpoint.floats(dtype),
        report.path,
        lambda name: (device, torch.float32 if WanModel.is_fp32(name) else dtype),
    )
    own = replace(named_variant(report.variant), network=network.config)
    return LoadedNetwork(network, own, report.sampling, report)


def load_vae(path: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> VideoVAE:
    """A VAE: ours, the published .pth or diffusers'.  Raises UserError for a file that does not fit."""
    checkpoint = _open(path, "vae")
    config, entries = sized_vae(checkpoint)
    return _build(lambda: VideoVAE(**config), entries, checkpoint.report.path, lambda name: (device, dtype))


def load_text_encoder(
    path: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    tokenizer: str | Path | None = None,
) -> TextEncoder:
    """A umT5 encoder.  Unless given, its tokenizer is looked for beside it; the byte-level one needs no file.

    Raises UserError for a file that does not fit.
    """
    from turbodiffusion.models.text import TextEncoder
    from turbodiffusion.models.tokenizers import ByteTokenizer, FileTokenizer

    checkpoint = _open(path, "text_encoder")
    config, entries = sized_text_encoder(checkpoint)
    if tokenizer is None and config["vocab"] == ByteTokenizer.vocab:
        reader = ByteTokenizer()
    else:
        reader = FileTokenizer(tokenizer or locate("tokenizer", "umt5_xxl", Path(path)))
    return _build(
        lambda: TextEncoder(tokenizer=reader, **config),
        entries,
        checkpoint.report.path,
        lambda name: (device, dtype),
    )


def load_image_encoder(path: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> ImageEncoder:
    """A CLIP image tower.  Raises UserError for a file that does not fit."""
    from turbodiffusion.models.clip import ImageEncoder

    checkpoint = _open(path, "image_encoder")
    config, entries = sized_image_encoder(checkpoint)
    return _build(
        lambda: ImageEncoder(**config), entries, checkpoint.report.path, lambda name: (device, dtype)
    )


def fill(module: nn.Module, entries: dict[str, Entry], path: Path, place: Place) -> None:
    """Give a module built on the meta device its tensors, each at its `place`; one copy, read one by one."""
    check_fit(module, entries, path)
    state = {}
    for name in module.state_dict():
        device, dtype = place(name)
        # a copy, since what was read may be a window on the file
        state[name] = entries[name].load().to(device, dtype, copy=True)
    module.load_state_dict(state, strict=True, assign=True)
    tensors = chain(module.named_parameters(), module.named_buffers())
    assert not [name for name, tensor in tensors if tensor.is_meta]


def on_meta(make: Callable[[], Module], path: Path) -> Module:
    """The module without memory for its parameters; UserError if the checkpoint's config does not fit."""
    try:
        with torch.device("meta"):
            return make()
    except TypeError as error:
        raise UserError(f"{path} carries a config that does not fit this code: {error}") from error


def check_fit(module: nn.Module, entries: dict[str, Entry], path: Path) -> None:
    """Raises UserError naming up to ten missing, unexpected and misfitting tensors each; reads none."""
    wanted = module.state_dict()
    misfits = [
        f"{name} {entry.shape} {entry.dtype} (wanted {tuple(wanted[name].shape)})"
        for name, entry in entries.items()
        if name in wanted and (entry.shape != tuple(wanted[name].shape) or not entry.dtype.is_floating_point)
    ]
    faults = {
        "missing": sorted(wanted.keys() - entries.keys()),
        "unexpected": sorted(entries.keys() - wanted.keys()),
        "misfitting": misfits,
    }
    if said := [f"{len(names)} {fault}: {', '.join(names[:10])}" for fault, names in faults.items() if names]:
        raise UserError(f"{path} does not fit {type(module).__name__}; {'; '.join(said)}")


def _open(path: str | Path, kind: str, *, variant: str | None = None, ema: bool = True) -> Checkpoint:
    checkpoint = open_checkpoint(path, kind=kind, variant=variant, ema=ema)
    if checkpoint.report.kind != kind:
        got, wanted = checkpoint.report.kind.replace("_", " "), kind.replace("_", " ")
        raise UserError(f"{checkpoint.report.path} holds {got} weights; wanted {wanted} weights")
    return checkpoint


def _build(make: Callable[[], Module], entries: dict[str, Entry], path: Path, place: Place) -> Module:
    module = on_meta(make, path)
    fill(module, entries, path, place)
    return module
