"""Names of the video transformer's tensors: ours (those of the published Wan files) <-> other formats.

A name is looked up whole, with its layer's number taken out, so no rule can hit a part of it.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

from turbodiffusion.checkpoints.sources import Entries, Entry

_LAYER = re.compile(r"(blocks|encoder\.block|encoder\.layers|visual\.transformer)\.(\d+)\.")
_LEAVES = ("", ".weight", ".bias", ".int8_weight", ".scale", ".weight_scale_inv")
_PATCH = "patch_embedding.weight"


def take_number(name: str) -> tuple[str, str]:
    """`blocks.7.norm3.bias` -> `blocks.{}.norm3.bias` and "7"; outside the layers, the name and ""."""
    match = _LAYER.match(name)
    return (f"{match[1]}.{{}}.{name[match.end() :]}", match[2]) if match else (name, "")


def count_layers(names: Iterable[str]) -> int:
    """One more than the highest number of a layer."""
    return 1 + max(int(number) for _, number in map(take_number, names) if number)


def rename(name: str, table: dict[str, str]) -> str | None:
    """What the table has for a tensor's name; {} stands for the layer's number."""
    template, number = take_number(name)
    return table[template].format(number) if template in table else None


def with_leaves(modules: dict[str, str]) -> dict[str, str]:
    """Names of tensors from names of modules."""
    return {one + leaf: other + leaf for one, other in modules.items() for leaf in _LEAVES}


def inverse(table: dict[str, str]) -> dict[str, str]:
    """From the second name to the first."""
    return {other: one for one, other in table.items()}


_ATTENTION = {
    **{"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"},
    **{"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"},
}
# diffusers' WanTransformer3DModel
_TO_DIFFUSERS = with_leaves(
    {
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "head.modulation": "scale_shift_table",
        "head.head": "proj_out",
        "blocks.{}.modulation": "blocks.{}.scale_shift_table",
        # the affine norm; diffusers numbers them in the order of their use
        "blocks.{}.norm3": "blocks.{}.norm2",
        "blocks.{}.ffn.0": "blocks.{}.ffn.net.0.proj",
        "blocks.{}.ffn.2": "blocks.{}.ffn.net.2",
        **{f"blocks.{{}}.self_attn.{a}": f"blocks.{{}}.attn1.{b}" for a, b in _ATTENTION.items()},
        **{f"blocks.{{}}.cross_attn.{a}": f"blocks.{{}}.attn2.{b}" for a, b in _ATTENTION.items()},
    }
)
_SLA = "blocks.{}.self_attn.core.proj_l"
_TO_TURBODIFFUSION = with_leaves({_SLA: "blocks.{}.self_attn.attn_op.local_attn.proj_l"})
_FROM_TURBODIFFUSION = inverse(_TO_TURBODIFFUSION)
# converters outside this project have three names for SLA's projection in diffusers-like files
_SLA_PLACES = ("attn_op.local_attn", "local_attn", "attn_impl")
_FROM_DIFFUSERS = inverse(_TO_DIFFUSERS) | with_leaves(
    {f"blocks.{{}}.attn1.{place}.proj_l": _SLA for place in _SLA_PLACES}
)


def is_projection(name: str) -> bool:
    """Whether a tensor of our naming is part of SLA's linear branch."""
    return take_number(name)[0].startswith(_SLA)


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether the transformer's tensors carry diffusers' names."""
    return any(name.startswith("condition_embedder.") for name in names)


def network_from_diffusers(name: str) -> str:
    """Ours from diffusers' name of a tensor; a name that is not in the table stays as it is."""
    return rename(name, _FROM_DIFFUSERS) or name


def network_to_diffusers(name: str) -> str:
    """The inverse of network_from_diffusers."""
    return rename(name, _TO_DIFFUSERS) or name


def from_turbodiffusion(entries: Entries) -> Entries:
    """Ours from rCM and TurboDiffusion files: patch weight (D, 4 in) -> (D, in, 1, 2, 2), and SLA moves."""
    renamed = {rename(name, _FROM_TURBODIFFUSION) or name: entry for name, entry in entries.items()}
    patch = renamed[_PATCH]
    if len(patch.shape) == 2 and patch.shape[1] % 4 == 0:
        renamed[_PATCH] = _reshaped(patch, (patch.shape[0], patch.shape[1] // 4, 1, 2, 2))
    return renamed


def to_turbodiffusion(entries: Entries) -> Entries:
    """The inverse of from_turbodiffusion."""
    renamed = {rename(name, _TO_TURBODIFFUSION) or name: entry for name, entry in entries.items()}
    patch = renamed[_PATCH]
    return renamed | {_PATCH: _reshaped(patch, (patch.shape[0], 4 * patch.shape[1]))}


def strip_prefixes(entries: Entries, *, ema: bool) -> tuple[Entries, list[str]]:
    """The generator's tensors without the names of wrappers, and what was done, in words.

    A training checkpoint may hold the weights (`net.`), their moving average (`net_ema.`) and other networks:
    the average is taken unless `ema` is false or there is none.
    """
    entries = {name.replace("_checkpoint_wrapped_module.", ""): entry for name, entry in entries.items()}
    groups = [prefix for prefix in ("net_ema.", "net.") if any(name.startswith(prefix) for name in entries)]
    if not groups:
        return entries, []
    chosen = groups[0] if ema else groups[-1]
    kept = {name.removeprefix(chosen): entry for name, entry in entries.items() if name.startswith(chosen)}
    dropped = sorted({name.split(".")[0] for name in entries if not name.startswith(chosen)})
    aside = f", leaving aside {', '.join(dropped[:5])}" if dropped else ""
    return kept, [f"took the weights under {chosen!r}{aside}"]


def _reshaped(entry: Entry, shape: tuple[int, ...]) -> Entry:
    return replace(entry, shape=shape, load=lambda: entry.load().reshape(shape))
