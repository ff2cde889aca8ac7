"""A checkpoint of any format to a file or folder of a chosen format, tensor by tensor."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from turbodiffusion.attention import DENSE
from turbodiffusion.checkpoints import keys
from turbodiffusion.checkpoints.detect import Checkpoint
from turbodiffusion.checkpoints.encoder_keys import text_to_published
from turbodiffusion.checkpoints.encoders import VAE_CONFIG
from turbodiffusion.checkpoints.files import appearing_folder
from turbodiffusion.checkpoints.loading import check_fit, kept_dtype
from turbodiffusion.checkpoints.metadata import Metadata, Numbers, empty_module
from turbodiffusion.checkpoints.saving import write_json, write_safetensors, write_shards, write_torch
from turbodiffusion.checkpoints.sources import Entries
from turbodiffusion.checkpoints.vae_keys import vae_to_diffusers
from turbodiffusion.errors import UserError
from turbodiffusion.models.tokenizers import ByteTokenizer
from turbodiffusion.models.wan import CLIP_DIM, CLIP_TOKENS

_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


@dataclass(frozen=True)
class Format:
    """suffixes: of its files, "" for a folder; names: from ours to its; config: a folder's config.json."""

    suffixes: tuple[str, ...] = (".safetensors",)
    names: Callable[[Entries, Numbers], Entries] | None = None
    config: Callable[[Numbers], dict[str, object]] | None = None


def prepare(
    checkpoint: Checkpoint, dtype: torch.dtype | None, deed: dict[str, object]
) -> tuple[Entries, Metadata]:
    """The tensors with our names, in `dtype` or as stored, and what they are; strict like loading.

    INT8 weights become `dtype`, else bf16.  With a `dtype` a network's norms and modulation become fp32.
    deed: what is done, for the history.
    """
    report = checkpoint.report
    entries = checkpoint.floats(dtype or torch.bfloat16)
    # no text is read here, so any tokenizer does
    others = {"tokenizer": ByteTokenizer()} if report.kind == "text_encoder" else {}
    module = empty_module(report, **others)
    check_fit(module, entries, report.path)
    if dtype is not None:
        entries = {name: entry.to(kept_dtype(report.kind, name, dtype)) for name, entry in entries.items()}
    history = (*report.history, deed)
    return entries, Metadata(report.kind, module.config, report.variant, report.sampling, history)


def write(entries: Entries, metadata: Metadata, path: Path, format: str, max_shard: int) -> None:
    """Write the tensors in `format`; a folder gets shards of at most `max_shard` bytes.

    Raises UserError where the format has no place for what there is.
    """
    kind, config = metadata.kind, metadata.config
    suffix = check_destination(kind, path, format)
    if format in ("wan", "diffusers") and config.get("attention", DENSE) != DENSE:
        raise UserError("that format has no place for SLA's proj_l; use format=ours or format=turbodiffusion")
    target = _FORMATS[kind][format]
    if target.names:
        entries = target.names(entries, config)
    header = replace(metadata, format=format).header()
    if suffix == ".pth":
        write_torch(path, entries)
    elif suffix:
        write_safetensors(path, entries, header)
    else:
        with appearing_folder(path) as folder:
            write_shards(folder, entries, header, max_shard)
            if target.config:
                write_json(folder / "config.json", target.config(config))


def check_destination(kind: str, path: Path, format: str) -> str:
    """The suffix of the file to write, "" for a folder; UserError if kind, format and path do not agree."""
    formats = _FORMATS[kind]
    if format not in formats:
        choices = " or ".join(formats)
        raise UserError(f"a {kind.replace('_', ' ')} can be written as {choices}, not as {format}")
    suffix = path.suffix if path.suffix in _FILE_SUFFIXES else ""
    if suffix not in formats[format].suffixes:
        places = (f"a {s} file" if s else "a folder (no suffix)" for s in formats[format].suffixes)
        raise UserError(f"format={format} writes {' or '.join(places)}; got {path}")
    return suffix


def _network_to_diffusers(entries: Entries, _: Numbers) -> Entries:
    return {keys.network_to_diffusers(name): entry for name, entry in entries.items()}


def _vae_to_diffusers(entries: Entries, config: Numbers) -> Entries:
    return {vae_to_diffusers(n, res_blocks=config["res_blocks"]): entry for n, entry in entries.items()}


def _wan_config(config: Numbers) -> dict[str, object]:
    """What the published Wan folders say."""
    conditions = {48: "ti2v", 36: "i2v"}
    task = "flf2v" if config["clip_tokens"] > CLIP_TOKENS else conditions.get(config["in_channels"], "t2v")
    return {
        "_class_name": "WanModel",
        "model_type": task,
        **{name: config[name] for name in ("dim", "ffn_dim", "freq_dim")},
        "in_dim": config["in_channels"],
        "out_dim": config["out_channels"],
        "num_heads": config["heads"],
        "num_layers": config["layers"],
        "text_len": config["text_length"],
        "eps": 1e-6,
    }


def _diffusers_config(config: Numbers) -> dict[str, object]:
    """WanTransformer3DModel's arguments."""
    clip_tokens = config["clip_tokens"]
    same = ("in_channels", "out_channels", "text_dim", "freq_dim", "ffn_dim")
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 2, 2],
        "num_attention_heads": config["heads"],
        "attention_head_dim": config["dim"] // config["heads"],
        **{name: config[name] for name in same},
        "num_layers": config["layers"],
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": CLIP_DIM if clip_tokens else None,
        "added_kv_proj_dim": config["dim"] if clip_tokens else None,
        "pos_embed_seq_len": clip_tokens if clip_tokens > CLIP_TOKENS else None,
    }


def _diffusers_vae_config(config: Numbers) -> dict[str, object]:
    """AutoencoderKLWan's arguments."""
    patch = config["patch"]
    return {
        "_class_name": "AutoencoderKLWan",
        **{theirs: config[ours] for ours, theirs in VAE_CONFIG.items()},
        "in_channels": 3 * patch**2,
        "out_channels": 3 * patch**2,
        "patch_size": patch if patch > 1 else None,
        "is_residual": patch > 1,
        "scale_factor_temporal": 2 ** sum(config["temporal"]),
        "scale_factor_spatial": patch * 2 ** len(config["temporal"]),
    }


_FORMATS = {
    "network": {
        "ours": Format((".safetensors", "")),
        "wan": Format((".safetensors", ""), config=_wan_config),
        "diffusers": Format(("",), _network_to_diffusers, _diffusers_config),
        "turbodiffusion": Format((".pth",), lambda entries, _: keys.to_turbodiffusion(entries)),
    },
    "vae": {
        "ours": Format(),
        "wan": Format((".pth", ".safetensors")),
        "diffusers": Format(("",), _vae_to_diffusers, _diffusers_vae_config),
    },
    "text_encoder": {
        "ours": Format(),
        "wan": Format((".pth",), lambda entries, _: text_to_published(entries)),
    },
    "image_encoder": {"ours": Format()},
}
