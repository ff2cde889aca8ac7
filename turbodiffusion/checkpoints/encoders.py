"""Sizes and our names of text and image encoder checkpoints, and of VAEs."""

import math
import re

import torch
import yaml

from turbodiffusion.checkpoints.detect import Checkpoint
from turbodiffusion.checkpoints.encoder_keys import (
    image_from_published,
    image_from_transformers,
    text_from_published,
    text_from_transformers,
)
from turbodiffusion.checkpoints.metadata import Numbers
from turbodiffusion.checkpoints.sources import Entry
from turbodiffusion.checkpoints.vae_keys import vae_to_diffusers
from turbodiffusion.errors import UserError
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.variants import CONFIGS

Sized = tuple[Numbers, dict[str, Entry]]

# VideoVAE's arguments -> the names in diffusers' config.json
VAE_CONFIG = {
    "base": "base_dim",
    "decoder_base": "decoder_base_dim",
    "latent_channels": "z_dim",
    "multipliers": "dim_mult",
    "res_blocks": "num_res_blocks",
    "temporal": "temperal_downsample",
    "patch": "patch_size",
    "latent_mean": "latents_mean",
    "latent_std": "latents_std",
}
_CLIP_HEAD_WIDTH = 80  # ViT-H


def sized_vae(checkpoint: Checkpoint) -> Sized:
    """VideoVAE's arguments and tensors."""
    report, entries = checkpoint.report, checkpoint.entries
    config = report.config or _vae_config(checkpoint)
    if report.format != "diffusers":
        return config, entries
    with torch.device("meta"):
        names = list(VideoVAE(**config).state_dict())
    theirs = {vae_to_diffusers(name, res_blocks=config["res_blocks"]): name for name in names}
    return config, {theirs.get(name, name): entry for name, entry in entries.items()}


def _vae_config(checkpoint: Checkpoint) -> Numbers:
    """From diffusers' config.json or, by its widths, a published VAE, whose statistics are known."""
    stated = checkpoint.folder_config
    if checkpoint.report.format == "diffusers" and "latents_mean" in stated:
        return {ours: stated[theirs] for ours, theirs in VAE_CONFIG.items() if stated.get(theirs) is not None}
    suffix = "conv_in" if checkpoint.report.format == "diffusers" else "conv1"
    last = "post_quant_conv" if checkpoint.report.format == "diffusers" else "conv2"
    base = _shape(checkpoint, checkpoint.entries, f"encoder.{suffix}.weight")[0]
    channels = _shape(checkpoint, checkpoint.entries, f"{last}.weight")[0]
    for name in ("wan2.1", "wan2.2"):
        config = yaml.safe_load((CONFIGS / "vae" / f"{name}.yaml").read_text())
        del config["_target_"]
        if (config["base"], config["latent_channels"]) == (base, channels):
            return config
    raise UserError(
        f"{checkpoint.report.path} is a VAE of base width {base} with {channels} latent channels; "
        "without metadata only the Wan2.1 (96, 16) and Wan2.2 (160, 48) VAEs are known"
    )


def sized_text_encoder(checkpoint: Checkpoint) -> Sized:
    """TextEncoder's arguments, less the tokenizer, and its tensors."""
    if checkpoint.report.config:
        return checkpoint.report.config, checkpoint.entries
    is_transformers = checkpoint.report.format == "diffusers"
    entries = checkpoint.mapped(text_from_transformers if is_transformers else text_from_published)
    vocab, dim = _shape(checkpoint, entries, "encoder.embed_tokens.weight")
    first = "encoder.block.0.layer"
    heads = _shape(checkpoint, entries, f"{first}.0.SelfAttention.relative_attention_bias.weight")[1]
    config: Numbers = {
        "vocab": vocab,
        "dim": dim,
        "ffn_dim": _shape(checkpoint, entries, f"{first}.1.DenseReluDense.wi_0.weight")[0],
        "heads": heads,
        "head_dim": _shape(checkpoint, entries, f"{first}.0.SelfAttention.q.weight")[0] // heads,
        "layers": _layers(entries, r"encoder\.block\.(\d+)\."),
    }
    return config, entries


def sized_image_encoder(checkpoint: Checkpoint) -> Sized:
    """ImageEncoder's arguments and tensors."""
    if checkpoint.report.config:
        return checkpoint.report.config, checkpoint.entries
    is_transformers = checkpoint.report.format == "diffusers"
    entries = checkpoint.mapped(image_from_transformers if is_transformers else image_from_published)
    dim, _, patch, _ = _shape(checkpoint, entries, "embeddings.patch_embedding.weight")
    positions = _shape(checkpoint, entries, "embeddings.position_embedding.weight")[0]
    config: Numbers = {
        "dim": dim,
        "ffn_dim": _shape(checkpoint, entries, "encoder.layers.0.mlp.fc1.weight")[0],
        "heads": checkpoint.folder_config.get("num_attention_heads", dim // _CLIP_HEAD_WIDTH),
        "layers": _layers(entries, r"encoder\.layers\.(\d+)\."),
        "patch": patch,
        "size": patch * math.isqrt(positions - 1),
    }
    return config, entries


def _layers(entries: dict[str, Entry], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in entries if (match := re.match(pattern, name)))


def _shape(checkpoint: Checkpoint, entries: dict[str, Entry], name: str) -> tuple[int, ...]:
    if name not in entries:
        raise UserError(f"{checkpoint.report.path} is incomplete: it lacks {name}")
    return entries[name].shape
