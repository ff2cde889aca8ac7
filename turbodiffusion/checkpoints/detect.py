"""What a checkpoint is: kind, format, sizes and variant, with the reason for every conclusion."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from turbodiffusion.checkpoints import encoders, keys
from turbodiffusion.checkpoints.metadata import Report, read_metadata
from turbodiffusion.checkpoints.network_config import choose_variant, network_config
from turbodiffusion.checkpoints.quantised import TILES, dequantised, linear_layers, quantised, stored_layers
from turbodiffusion.checkpoints.sources import DCP, Entries, open_source
from turbodiffusion.errors import UserError

# a tensor that every checkpoint of a kind has -> the kind, and the format whose name it is
_SIGNS = {
    "patch_embedding.weight": ("network", "wan"),
    "encoder.conv1.weight": ("vae", "wan"),
    "encoder.conv_in.weight": ("vae", "diffusers"),
    "token_embedding.weight": ("text_encoder", "wan"),
    "shared.weight": ("text_encoder", "diffusers"),
    "encoder.embed_tokens.weight": ("text_encoder", "diffusers"),
    "visual.patch_embedding.weight": ("image_encoder", "wan"),
    "vision_model.embeddings.patch_embedding.weight": ("image_encoder", "diffusers"),
    "embeddings.patch_embedding.weight": ("image_encoder", "diffusers"),
}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: what it is, and its tensors with our names, in the numbers that are stored."""

    report: Report
    entries: Entries

    def floats(self, dtype: torch.dtype) -> Entries:
        """The tensors with 8-bit weights de-quantised to `dtype`; the others as stored."""
        return dequantised(self.entries, dtype)

    def in_eight_bits(self, scheme: str) -> Entries:
        """The tensors with the weights of `report.eight_bit_layers` in int8 or fp8, as stored or anew."""
        if set(self.report.quantised.values()) == {scheme}:
            return self.entries
        return quantised(self.floats(torch.float32), self.report.eight_bit_layers, scheme)


def detect(path: str | Path, *, kind: str = "network", variant: str | None = None) -> Report:
    """What the checkpoint at `path` is.  `kind` matters only for the folder of a whole diffusers pipeline."""
    return open_checkpoint(path, kind=kind, variant=variant).report


def open_kind(path: str | Path, kind: str, *, variant: str | None = None, ema: bool = True) -> Checkpoint:
    """`open_checkpoint`, and UserError for a checkpoint of another kind."""
    checkpoint = open_checkpoint(path, kind=kind, variant=variant, ema=ema)
    if checkpoint.report.kind != kind:
        got, wanted = (each.replace("_", " ") for each in (checkpoint.report.kind, kind))
        raise UserError(f"{checkpoint.report.path} holds {got} weights; wanted {wanted} weights")
    return checkpoint


def open_checkpoint(
    path: str | Path, *, kind: str = "network", variant: str | None = None, ema: bool = True
) -> Checkpoint:
    """Open and recognise a checkpoint without reading its numbers.

    `variant` settles what keys can not tell.  Raises UserError for what is no checkpoint of ours to read.
    """
    # a diffusers pipeline's folders have the names of our kinds, but one
    source = open_source(path, "transformer" if kind == "network" else kind)
    entries, stripped = keys.strip_prefixes(source.entries, ema=ema)
    sign = _sign(source.path, entries)
    metadata = read_metadata(source.header, source.path)
    found, format = (metadata.kind, metadata.format) if metadata else _SIGNS[sign]
    dtypes: dict[torch.dtype, tuple[int, int]] = {}
    for entry in entries.values():
        count, size = dtypes.get(entry.dtype, (0, 0))
        dtypes[entry.dtype] = (count + 1, size + entry.nbytes)
    report = Report(source.path, found, format, source.layout, dtypes, [*source.notes, *stripped], metadata)
    if found == "network":
        entries = _recognise_network(report, entries, source.config)
        choose_variant(report, variant)
    else:
        report.reasons.append(f"{found}: it has {sign}")
        entries = encoders.recognise(report, entries, source.config)
    return Checkpoint(report, entries)


def _sign(path: Path, entries: Entries) -> str:
    """The tensor that gives the kind away."""
    if any(name.startswith("vace_") for name in entries):
        raise UserError(f"{path} is a VACE model, which is not supported; use one of T2V, I2V, FLF2V or TI2V")
    if any(".lora_" in name for name in entries):
        raise UserError(f"{path} holds LoRA weights, not a model; give the checkpoint they are made for")
    for sign in _SIGNS:
        if sign in entries:
            return sign
    held = f"{len(entries)} tensors ({', '.join(list(entries)[:3]) or 'nothing'})"
    raise UserError(f"{path} is no Wan network, VAE, text or image encoder: it holds {held}")


def _recognise_network(report: Report, stored: Entries, folder_config: dict[str, object]) -> Entries:
    """The tensors with our names; the report gets the format, which are in 8 bits, and the sizes."""
    is_diffusers = keys.is_diffusers(stored)
    entries = {keys.network_from_diffusers(n): e for n, e in stored.items()} if is_diffusers else stored
    entries = keys.from_turbodiffusion(entries)
    floats = dequantised(entries, torch.bfloat16)
    report.linear, report.quantised = linear_layers(floats), stored_layers(entries)
    patch = stored["patch_embedding.weight"].shape
    if report.layout == DCP:
        report.format, reason = "dcp", "the folder is a torch.distributed.checkpoint"
    elif is_diffusers:
        report.format, reason = "diffusers", "names begin with condition_embedder."
    elif len(patch) == 2:
        is_tuned = bool(report.quantised) or any(map(keys.is_projection, entries))
        report.format = "turbodiffusion" if is_tuned else "rcm"
        reason = f"patch_embedding.weight is a matrix {patch}"
    elif report.metadata:
        reason = "our metadata"
    else:
        reason = f"original names, patch_embedding.weight is {len(patch)}-D, no metadata"
    report.reasons.append(f"{report.format}: {reason}")
    for scheme, count in Counter(report.quantised.values()).items():
        what = "int8 in 128 x 128 tiles" if scheme == TILES else f"{scheme} by output channel"
        report.reasons.append(f"quantised: {count} of {len(report.linear)} linear layers are {what}")
    report.config = network_config(report, floats, folder_config)
    return entries
