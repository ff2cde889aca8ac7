"""Names of the video transformer's tensors: ours (those of the published Wan files) <-> other formats.

A name is a stem, with its block's number taken out, and a leaf such as `.weight`.  Stems are looked up whole
in one table, so no rule can hit half a name and their order does not matter.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from turbodiffusion.checkpoints.sources import Entry

Entries = dict[str, Entry]

# ours -> diffusers' WanTransformer3DModel; {} is the block's number
_DIFFUSERS = {
    "patch_embedding": "patch_embedding",
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
    **{
        f"blocks.{{}}.{ours}.{part}": f"blocks.{{}}.{theirs}.{their_part}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, their_part in (
            *(("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")),
            *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
        )
    },
    "blocks.{}.cross_attn.k_img": "blocks.{}.attn2.add_k_proj",
    "blocks.{}.cross_attn.v_img": "blocks.{}.attn2.add_v_proj",
    "blocks.{}.cross_attn.norm_k_img": "blocks.{}.attn2.norm_added_k",
}
SLA_STEM = "blocks.{}.self_attn.core.proj_l"
_TURBODIFFUSION = {SLA_STEM: "blocks.{}.self_attn.attn_op.local_attn.proj_l"}
# names that converters outside this project gave SLA's projection in diffusers-like files
_ALIASES = dict.fromkeys(
    (
        "blocks.{}.attn1.attn_op.local_attn.proj_l",
        "blocks.{}.attn1.local_attn.proj_l",
        "blocks.{}.attn1.attn_impl.proj_l",
    ),
    SLA_STEM,
)
_FROM_DIFFUSERS = {theirs: ours for ours, theirs in _DIFFUSERS.items()} | _ALIASES
_FROM_TURBODIFFUSION = {theirs: ours for ours, theirs in _TURBODIFFUSION.items()}

_NAME = re.compile(
    r"(?:blocks\.(?P<block>\d+)\.)?(?P<rest>.+?)(?P<leaf>\.(?:weight|bias|int8_weight|scale|weight_scale_inv))?"
)
_PATCH = "patch_embedding.weight"


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether the transformer's tensors carry diffusers' names."""
    return any(name.startswith("condition_embedder.") for name in names)


def network_from_diffusers(name: str) -> str:
    """Ours from diffusers' name of a tensor; a name that is not in the table stays as it is."""
    return _rename(name, _FROM_DIFFUSERS)


def network_to_diffusers(name: str) -> str:
    """The inverse of network_from_diffusers."""
    return _rename(name, _DIFFUSERS)


def from_turbodiffusion(entries: Entries) -> Entries:
    """Ours from rCM and TurboDiffusion files: patch weight (D, 4 in) -> (D, in, 1, 2, 2), and SLA moves."""
    renamed = {_rename(name, _FROM_TURBODIFFUSION): entry for name, entry in entries.items()}
    patch = renamed.get(_PATCH)
    if patch is not None and len(patch.shape) == 2 and patch.shape[1] % 4 == 0:
        renamed[_PATCH] = _reshaped(patch, (patch.shape[0], patch.shape[1] // 4, 1, 2, 2))
    return renamed


def to_turbodiffusion(entries: Entries) -> Entries:
    """The inverse of from_turbodiffusion."""
    renamed = {_rename(name, _TURBODIFFUSION): entry for name, entry in entries.items()}
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


def _rename(name: str, table: dict[str, str]) -> str:
    match = _NAME.fullmatch(name)
    assert match
    stem = match["rest"] if match["block"] is None else f"blocks.{{}}.{match['rest']}"
    return table.get(stem, stem).replace("{}", match["block"] or "{}") + (match["leaf"] or "")


def _reshaped(entry: Entry, shape: tuple[int, ...]) -> Entry:
    def load() -> Tensor:
        return entry.load().reshape(shape)

    return replace(entry, shape=shape, load=load)
