"""What a checkpoint is: kind, format, sizes and variant, with the reason for every conclusion."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from turbodiffusion.checkpoints import keys
from turbodiffusion.checkpoints.metadata import Metadata, read_metadata
from turbodiffusion.checkpoints.network_config import choose_variant, network_config
from turbodiffusion.checkpoints.quantised import dequantised, is_quantised
from turbodiffusion.checkpoints.report import Report
from turbodiffusion.checkpoints.sources import DCP, Entry, Source, open_source
from turbodiffusion.errors import UserError

# the subfolder of a diffusers pipeline that holds each kind
PARTS = {
    "network": "transformer",
    "vae": "vae",
    "text_encoder": "text_encoder",
    "image_encoder": "image_encoder",
}
_SIGNS = {
    "network": ("patch_embedding.weight",),
    "vae": ("encoder.conv1.weight", "encoder.conv_in.weight"),
    "text_encoder": ("token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight"),
    "image_encoder": (
        "visual.patch_embedding.weight",
        "vision_model.embeddings.patch_embedding.weight",
        "embeddings.patch_embedding.weight",
    ),
}
# names that only one format uses, for the kinds whose format has no other sign
_DIFFUSERS_SIGNS = (
    "encoder.conv_in.weight",
    "shared.weight",
    "encoder.embed_tokens.weight",
    "vision_model.embeddings.patch_embedding.weight",
    "embeddings.patch_embedding.weight",
)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: what it is, and its tensors as stored; a network's have our names already."""

    report: Report
    entries: dict[str, Entry]
    folder_config: dict[str, object]  # config.json, where there is one

    def floats(self, dtype: torch.dtype) -> dict[str, Entry]:
        """The tensors with INT8 weights de-quantised to `dtype`; the others as stored."""
        return dequantised(self.entries, dtype)

    def mapped(self, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Entry]:
        """The tensors renamed by a function of state dicts.  Files are mapped, so nothing is read yet."""
        state = rename({name: entry.load() for name, entry in self.entries.items()})
        return {name: Entry.of(tensor) for name, tensor in state.items()}


def detect(path: str | Path, *, kind: str = "network", variant: str | None = None) -> Report:
    """What the checkpoint at `path` is.  `kind` matters only for the folder of a whole diffusers pipeline."""
    return open_checkpoint(path, kind=kind, variant=variant).report


def open_checkpoint(
    path: str | Path, *, kind: str = "network", variant: str | None = None, ema: bool = True
) -> Checkpoint:
    """Open and recognise a checkpoint without reading its numbers.

    `variant` settles what keys can not tell.  Raises UserError for what is no checkpoint of ours to read.
    """
    source = open_source(path, PARTS[kind])
    entries, stripped = keys.strip_prefixes(source.entries, ema=ema)
    metadata = read_metadata(source.header, source.path)
    found = _kind(source.path, entries, metadata)
    dtypes: dict[torch.dtype, tuple[int, int]] = {}
    for entry in entries.values():
        count, size = dtypes.get(entry.dtype, (0, 0))
        dtypes[entry.dtype] = (count + 1, size + entry.nbytes)
    report = Report(
        path=source.path,
        kind=found,
        format=_encoder_format(entries, metadata),
        layout=source.layout,
        dtypes=dtypes,
        reasons=(*source.notes, *stripped),
        metadata=metadata,
        config=metadata and metadata.config,
    )
    if found != "network":
        report = replace(report, reasons=(*report.reasons, f"{found}: it has {_sign(found, entries)}"))
        return Checkpoint(report, entries, source.config)
    return _network(replace(source, entries=entries), report, variant)


def _network(source: Source, report: Report, variant: str | None) -> Checkpoint:
    """Ours from any naming, then the sizes and the variant."""
    entries = source.entries
    if keys.is_diffusers(entries):
        entries = {keys.network_from_diffusers(name): entry for name, entry in entries.items()}
    entries = keys.from_turbodiffusion(entries)
    quantised = is_quantised(set(entries))
    sla = any(name.endswith("proj_l.weight") for name in entries)
    format, reason = _network_format(source, report.metadata, is_turbo=quantised or sla)
    reasons = [*report.reasons, f"{format}: {reason}"]
    if quantised:
        count = sum(name.endswith((".int8_weight", ".weight_scale_inv")) for name in entries)
        reasons.append(f"quantised: {count} weights are INT8 in 128 x 128 tiles")
    if sla:
        reasons.append("SLA: self-attention carries proj_l; its top-k and block sizes are in no file")
    config = network_config(report, dequantised(entries, torch.bfloat16), source.config, reasons)
    report = replace(report, format=format, quantised=quantised, sla=sla, config=config)
    report = choose_variant(report, variant, reasons)
    return Checkpoint(replace(report, reasons=tuple(reasons)), entries, source.config)


def _network_format(source: Source, metadata: Metadata | None, *, is_turbo: bool) -> tuple[str, str]:
    """The format and why."""
    patch = source.entries["patch_embedding.weight"].shape
    if source.layout == DCP:
        return "dcp", "the folder is a torch.distributed.checkpoint"
    if keys.is_diffusers(source.entries):
        return "diffusers", "names begin with condition_embedder."
    if len(patch) == 2:
        return "turbodiffusion" if is_turbo else "rcm", f"patch_embedding.weight is a matrix {patch}"
    if metadata:
        return metadata.format, "our metadata"
    return "wan", f"original names, patch_embedding.weight is {len(patch)}-D, no metadata of ours"


def _kind(path: Path, entries: dict[str, Entry], metadata: Metadata | None) -> str:
    names = list(entries)
    if any(name.startswith("vace_") for name in names):
        raise UserError(
            f"{path} is a VACE model, which is not supported; use a T2V, I2V, FLF2V or TI2V checkpoint"
        )
    if any(".lora_" in name for name in names):
        raise UserError(f"{path} holds LoRA weights, not a model; give the checkpoint they are made for")
    if metadata:
        return metadata.kind
    for kind in _SIGNS:
        if _sign(kind, entries):
            return kind
    examples = ", ".join(names[:3]) or "nothing"
    raise UserError(
        f"{path} is no Wan network, VAE, text or image encoder: it holds {len(names)} tensors ({examples})"
    )


def _sign(kind: str, entries: dict[str, Entry]) -> str | None:
    return next((name for name in _SIGNS[kind] if name in entries), None)


def _encoder_format(entries: dict[str, Entry], metadata: Metadata | None) -> str:
    if metadata:
        return metadata.format
    return "diffusers" if any(name in entries for name in _DIFFUSERS_SIGNS) else "wan"
