"""A checkpoint of any format to a file or folder of a chosen format, tensor by tensor."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from turbodiffusion.checkpoints import keys
from turbodiffusion.checkpoints.detect import Checkpoint
from turbodiffusion.checkpoints.encoder_keys import text_to_published
from turbodiffusion.checkpoints.encoders import VAE_CONFIG, sized_image_encoder, sized_text_encoder, sized_vae
from turbodiffusion.checkpoints.files import appearing_folder
from turbodiffusion.checkpoints.loading import check_fit, on_meta
from turbodiffusion.checkpoints.metadata import Metadata, Numbers
from turbodiffusion.checkpoints.saving import write_json, write_safetensors, write_shards, write_torch
from turbodiffusion.checkpoints.sources import Entry
from turbodiffusion.checkpoints.vae_keys import vae_to_diffusers
from turbodiffusion.errors import UserError
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.models.wan import CLIP_DIM, CLIP_TOKENS, WanModel

# kind -> format -> what it may be written as: a file with that suffix, or "", a folder
DESTINATIONS = {
    "network": {
        "ours": (".safetensors", ""),
        "wan": (".safetensors", ""),
        "diffusers": ("",),
        "turbodiffusion": (".pth",),
    },
    "vae": {"ours": (".safetensors",), "wan": (".pth", ".safetensors"), "diffusers": ("",)},
    "text_encoder": {"ours": (".safetensors",), "wan": (".pth",)},
    "image_encoder": {"ours": (".safetensors",)},
}
_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_SLA = ".core.proj_l."


@dataclass(frozen=True)
class Export:
    """Tensors with our names, checked and ready to be written, and what they are."""

    entries: dict[str, Entry]
    metadata: Metadata


def prepare(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Export:
    """The tensors with our names, in `dtype` or as stored; strict like loading.

    INT8 weights become `dtype`, else bf16.  With a `dtype` a network's norms and modulation become fp32.
    """
    report = checkpoint.report
    make, entries = _model_and_tensors(checkpoint, dtype or torch.bfloat16)
    module = on_meta(make, report.path)
    # SLA's projection is no part of a dense network, but travels with it
    check_fit(module, {name: entry for name, entry in entries.items() if _SLA not in name}, report.path)
    if dtype is not None:
        is_fp32 = WanModel.is_fp32 if report.kind == "network" else _never
        entries = {name: _cast(e, torch.float32 if is_fp32(name) else dtype) for name, e in entries.items()}
    past = report.metadata.history if report.metadata else ()
    deed = {"converted": report.path.name, "from": report.format, "dtype": str(dtype or "as stored")}
    metadata = Metadata(report.kind, module.config, report.variant, report.sampling, (*past, deed))
    return Export(entries, metadata)


def write(export: Export, path: Path, format: str, max_shard: int) -> None:
    """Write the tensors in `format`; a folder gets shards of at most `max_shard` bytes.

    Raises UserError where the format has no place for what there is.
    """
    kind, config = export.metadata.kind, export.metadata.config
    suffix = check_destination(kind, path, format)
    entries = export.entries
    header = replace(export.metadata, format=format).header()
    if kind == "network" and format == "diffusers":
        if any(_SLA in name for name in entries):
            raise UserError(
                "diffusers has no place for SLA's proj_l; use format=ours or format=turbodiffusion"
            )
        entries = {keys.network_to_diffusers(name): entry for name, entry in entries.items()}
    elif kind == "vae" and format == "diffusers":
        entries = {vae_to_diffusers(n, res_blocks=config["res_blocks"]): e for n, e in entries.items()}
    elif format == "turbodiffusion":
        entries = keys.to_turbodiffusion(entries)
    elif kind == "text_encoder" and format == "wan":
        state = text_to_published({name: entry.load() for name, entry in entries.items()})
        entries = {name: Entry.of(tensor) for name, tensor in state.items()}
    if suffix == ".pth":
        write_torch(path, entries)
    elif suffix:
        write_safetensors(path, entries, header)
    else:
        with appearing_folder(path) as folder:
            write_shards(folder, entries, header, max_shard)
            if (kind, format) in _FOLDER_CONFIGS:
                write_json(folder / "config.json", _FOLDER_CONFIGS[kind, format](config))


def check_destination(kind: str, path: Path, format: str) -> str:
    """The suffix of the file to write, "" for a folder; UserError if kind, format and path do not agree."""
    formats = DESTINATIONS[kind]
    if format not in formats:
        raise UserError(
            f"a {kind.replace('_', ' ')} can be written as {' or '.join(formats)}, not as {format}"
        )
    suffix = path.suffix if path.suffix in _FILE_SUFFIXES else ""
    if suffix not in formats[format]:
        wanted = " or ".join(f"a {s} file" if s else "a folder (no suffix)" for s in formats[format])
        raise UserError(f"format={format} writes {wanted}; got {path}")
    return suffix


def _never(name: str) -> bool:
    return False


def _model_and_tensors(
    checkpoint: Checkpoint, dtype: torch.dtype
) -> tuple[Callable[[], nn.Module], dict[str, Entry]]:
    kind = checkpoint.report.kind
    if kind == "network":
        assert checkpoint.report.config
        return partial(WanModel, **checkpoint.report.config), checkpoint.floats(dtype)
    if kind == "vae":
        config, entries = sized_vae(checkpoint)
        return partial(VideoVAE, **config), entries
    from turbodiffusion.models.clip import ImageEncoder
    from turbodiffusion.models.text import TextEncoder
    from turbodiffusion.models.tokenizers import ByteTokenizer

    if kind == "text_encoder":
        config, entries = sized_text_encoder(checkpoint)
        # no text is read here, so any tokenizer does
        return partial(TextEncoder, tokenizer=ByteTokenizer(), **config), entries
    config, entries = sized_image_encoder(checkpoint)
    return partial(ImageEncoder, **config), entries


def _cast(entry: Entry, dtype: torch.dtype) -> Entry:
    def load() -> Tensor:
        return entry.load().to(dtype)

    return replace(entry, dtype=dtype, load=load)


def _wan_config(config: Numbers) -> dict[str, object]:
    """What the published Wan folders say."""
    conditions = {48: "ti2v", 36: "i2v"}
    task = "flf2v" if config["clip_tokens"] > CLIP_TOKENS else conditions.get(config["in_channels"], "t2v")
    return {
        "_class_name": "WanModel",
        "model_type": task,
        "dim": config["dim"],
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
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
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 2, 2],
        "num_attention_heads": config["heads"],
        "attention_head_dim": config["dim"] // config["heads"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "text_dim": config["text_dim"],
        "freq_dim": config["freq_dim"],
        "ffn_dim": config["ffn_dim"],
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
        **{theirs: config[ours] for ours, theirs in VAE_CONFIG.items() if ours != "patch"},
        "in_channels": 3 * patch**2,
        "out_channels": 3 * patch**2,
        "patch_size": patch if patch > 1 else None,
        "is_residual": patch > 1,
        "scale_factor_temporal": 2 ** sum(config["temporal"]),
        "scale_factor_spatial": patch * 2 ** len(config["temporal"]),
    }


_FOLDER_CONFIGS: dict[tuple[str, str], Callable[[Numbers], dict[str, object]]] = {
    ("network", "wan"): _wan_config,
    ("network", "diffusers"): _diffusers_config,
    ("vae", "diffusers"): _diffusers_vae_config,
}
