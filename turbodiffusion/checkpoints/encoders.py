"""VAEs and encoders: the arguments of their classes, and their tensors with our names."""

import math
from collections.abc import Callable
from functools import partial

import yaml

from turbodiffusion.checkpoints import encoder_keys
from turbodiffusion.checkpoints.keys import count_layers
from turbodiffusion.checkpoints.metadata import Numbers, Report, empty_module, shape_of
from turbodiffusion.checkpoints.sources import Entries, mapped
from turbodiffusion.checkpoints.vae_keys import vae_to_diffusers
from turbodiffusion.errors import UserError
from turbodiffusion.variants import CONFIGS

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
_OURS = {
    ("text_encoder", "wan"): encoder_keys.text_from_published,
    ("text_encoder", "diffusers"): encoder_keys.text_from_transformers,
    ("image_encoder", "wan"): encoder_keys.image_from_published,
    ("image_encoder", "diffusers"): encoder_keys.image_from_transformers,
}
_CLIP_HEAD_WIDTH = 80  # ViT-H


def recognise(report: Report, entries: Entries, folder_config: dict[str, object]) -> Entries:
    """The tensors with our names; the report gets the arguments of the class, if metadata has not said."""
    stated = report.metadata and report.metadata.config
    if report.kind == "vae":
        report.config = stated or _vae_config(report, entries, folder_config)
        if report.format != "diffusers":
            return entries
        names, res_blocks = empty_module(report).state_dict(), report.config["res_blocks"]
        ours = {vae_to_diffusers(name, res_blocks=res_blocks): name for name in names}
        return {ours.get(name, name): entry for name, entry in entries.items()}
    if stated:
        report.config = stated
        return entries
    entries = mapped(entries, _OURS[report.kind, report.format])
    shape = partial(shape_of, report, entries)
    is_text = report.kind == "text_encoder"
    report.config = _text_sizes(shape) if is_text else _image_sizes(shape, folder_config)
    report.config["layers"] = count_layers(entries)
    return entries


def _vae_config(report: Report, entries: Entries, folder_config: dict[str, object]) -> Numbers:
    """From diffusers' config.json or, by its widths, a published VAE, whose statistics are known."""
    first, last = "encoder.conv1", "conv2"
    if report.format == "diffusers":
        if "latents_mean" in folder_config:
            given = {ours: folder_config.get(theirs) for ours, theirs in VAE_CONFIG.items()}
            return {name: value for name, value in given.items() if value is not None}
        first, last = "encoder.conv_in", "post_quant_conv"
    base, channels = (shape_of(report, entries, f"{name}.weight", 5)[0] for name in (first, last))
    for name in ("wan2.1", "wan2.2"):
        config = yaml.safe_load((CONFIGS / "vae" / f"{name}.yaml").read_text())
        del config["_target_"]
        if (config["base"], config["latent_channels"]) == (base, channels):
            return config
    raise UserError(
        f"{report.path} is a VAE of base width {base} with {channels} latent channels; "
        "without metadata only the Wan2.1 (96, 16) and Wan2.2 (160, 48) VAEs are known"
    )


def _text_sizes(shape: Callable[..., tuple[int, ...]]) -> Numbers:
    attention = "encoder.block.0.layer.0.SelfAttention"
    vocab, dim = shape("encoder.embed_tokens.weight")
    heads = shape(f"{attention}.relative_attention_bias.weight")[1]
    return {
        "vocab": vocab,
        "dim": dim,
        "ffn_dim": shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        "heads": heads,
        "head_dim": shape(f"{attention}.q.weight")[0] // heads,
    }


def _image_sizes(shape: Callable[..., tuple[int, ...]], folder_config: dict[str, object]) -> Numbers:
    dim, _, patch, _ = shape("embeddings.patch_embedding.weight", 4)
    return {
        "dim": dim,
        "ffn_dim": shape("encoder.layers.0.mlp.fc1.weight")[0],
        "heads": folder_config.get("num_attention_heads", dim // _CLIP_HEAD_WIDTH),
        "patch": patch,
        "size": patch * math.isqrt(shape("embeddings.position_embedding.weight")[0] - 1),
    }
