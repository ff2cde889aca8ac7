"""What a checkpoint is: kind, format, sizes and variant, with the reason for every conclusion."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from turbodiffusion.checkpoints import keys
from turbodiffusion.checkpoints.metadata import read_metadata
from turbodiffusion.checkpoints.network_config import choose_variant, network_config
from turbodiffusion.checkpoints.quantised import dequantised, is_quantised
from turbodiffusion.checkpoints.report import Report
from turbodiffusion.checkpoints.sources import DCP, Entries, Source, open_source
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
    """An opened checkpoint: what it is, and its tensors as stored; a network's have our names already."""

    report: Report
    entries: Entries
    folder_config: dict[str, object]  # config.json, where there is one

    def floats(self, dtype: torch.dtype) -> Entries:
        """The tensors with INT8 weights de-quantised to `dtype`; the others as stored."""
        return dequantised(self.entries, dtype)


def detect(path: str | Path, *, kind: str = "network", variant: str | None = None) -> Report:
    """What the checkpoint at `path` is.  `kind` matters only for the folder of a whole diffusers pipeline."""
    return open_checkpoint(path, kind=kind, variant=variant).report


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
    report = Report(
        path=source.path,
        kind=found,
        format=format,
        layout=source.layout,
        dtypes=dtypes,
        reasons=(*source.notes, *stripped),
        metadata=metadata,
        config=metadata and metadata.config,
    )
    if found != "network":
        report = replace(report, reasons=(*report.reasons, f"{found}: it has {sign}"))
        return Checkpoint(report, entries, source.config)
    return _network(replace(source, entries=entries), report, variant)


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


def _network(source: Source, report: Report, variant: str | None) -> Checkpoint:
    """Ours from any naming, then the sizes and the variant."""
    stored = source.entries
    is_diffusers = keys.is_diffusers(stored)
    entries = {keys.network_from_diffusers(n): e for n, e in stored.items()} if is_diffusers else stored
    entries = keys.from_turbodiffusion(entries)
    floats = dequantised(entries, torch.bfloat16)
    quantised = is_quantised(set(entries))
    notes: list[str] = []
    config = network_config(report, floats, source.config, notes)
    sla = config["attention"]["name"] != "dense"
    patch = stored["patch_embedding.weight"].shape
    if source.layout == DCP:
        format, reason = "dcp", "the folder is a torch.distributed.checkpoint"
    elif is_diffusers:
        format, reason = "diffusers", "names begin with condition_embedder."
    elif len(patch) == 2:
        format = "turbodiffusion" if quantised or sla else "rcm"
        reason = f"patch_embedding.weight is a matrix {patch}"
    elif report.metadata:
        format, reason = report.format, "our metadata"
    else:
        format, reason = "wan", f"original names, patch_embedding.weight is {len(patch)}-D, no metadata"
    reasons = [*report.reasons, f"{format}: {reason}"]
    if quantised:
        # each has integers and scales in place of one weight
        count = len(entries) - len(floats)
        reasons.append(f"quantised: {count} weights are INT8 in 128 x 128 tiles")
    reasons += notes
    report = replace(report, format=format, quantised=quantised, config=config)
    report = choose_variant(report, variant, reasons)
    return Checkpoint(replace(report, reasons=tuple(reasons)), entries, source.config)
