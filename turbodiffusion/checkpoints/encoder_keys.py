"""Names of the text and image encoders' tensors: those of the published Wan files <-> ours.

Ours are transformers' names, less a second name for the text embedding and the prefix `vision_model.`.
A tensor must match one rule in full; any other raises.
"""

import re
from collections.abc import Collection

import torch

from turbodiffusion.checkpoints.keys import take_number
from turbodiffusion.checkpoints.sources import State
from turbodiffusion.errors import UserError

# a published name -> our names of the parts that it concatenates; {} is the layer's number
Rules = dict[str, tuple[str, ...]]


def _renames(modules: dict[str, str], leaves: tuple[str, ...]) -> Rules:
    return {f"{a}.{leaf}": (f"{b}.{leaf}",) for a, b in modules.items() for leaf in leaves}


_TEXT = _renames(
    {
        "token_embedding": "encoder.embed_tokens",
        "blocks.{}.norm1": "encoder.block.{}.layer.0.layer_norm",
        **{f"blocks.{{}}.attn.{x}": f"encoder.block.{{}}.layer.0.SelfAttention.{x}" for x in "qkvo"},
        "blocks.{}.pos_embedding.embedding": "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias",
        "blocks.{}.norm2": "encoder.block.{}.layer.1.layer_norm",
        "blocks.{}.ffn.gate.0": "encoder.block.{}.layer.1.DenseReluDense.wi_0",
        "blocks.{}.ffn.fc1": "encoder.block.{}.layer.1.DenseReluDense.wi_1",
        "blocks.{}.ffn.fc2": "encoder.block.{}.layer.1.DenseReluDense.wo",
        "norm": "encoder.final_layer_norm",
    },
    ("weight",),
)
_IMAGE = {
    "visual.cls_embedding": ("embeddings.class_embedding",),
    "visual.pos_embedding": ("embeddings.position_embedding.weight",),
    "visual.patch_embedding.weight": ("embeddings.patch_embedding.weight",),
    **_renames(
        {
            "visual.pre_norm": "pre_layrnorm",
            "visual.transformer.{}.norm1": "encoder.layers.{}.layer_norm1",
            "visual.transformer.{}.attn.proj": "encoder.layers.{}.self_attn.out_proj",
            "visual.transformer.{}.norm2": "encoder.layers.{}.layer_norm2",
            "visual.transformer.{}.mlp.0": "encoder.layers.{}.mlp.fc1",
            "visual.transformer.{}.mlp.2": "encoder.layers.{}.mlp.fc2",
        },
        ("weight", "bias"),
    ),
    **{
        f"visual.transformer.{{}}.attn.to_qkv.{leaf}": tuple(
            f"encoder.layers.{{}}.self_attn.{x}_proj.{leaf}" for x in "qkv"
        )
        for leaf in ("weight", "bias")
    },
}
# axes of size 1 that a published tensor has in front of ours
_AXES = {"visual.cls_embedding": 2, "visual.pos_embedding": 1}
# what follows the last layer that Wan reads, and CLIP's text side
_IMAGE_UNUSED = re.compile(
    r"textual\..+|log_scale|visual\.(head|post_norm\.(weight|bias))"
    r"|visual_projection\.weight|(vision_model\.)?(post_layernorm\.(weight|bias)|embeddings\.position_ids)"
)


def text_from_published(state: State) -> State:
    """TextEncoder's tensors from models_t5_umt5-xxl-enc-bf16.pth."""
    return _from_published(state, _TEXT)


def text_to_published(state: State) -> State:
    """The inverse of text_from_published."""
    return _to_published(state, _TEXT)


def text_from_transformers(state: State) -> State:
    """TextEncoder's tensors from a UMT5EncoderModel's: with either name of the embedding, or both."""
    ours = dict(state)
    shared = ours.pop("shared.weight", None)
    return ours if shared is None else {"encoder.embed_tokens.weight": shared} | ours


def image_from_published(state: State, *, layers: int = 31) -> State:
    """ImageEncoder's tensors from models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth.

    The text side, the head and the layers from number `layers` on are left out: Wan never reads them.
    """
    return _first_layers(_from_published(_used(state), _IMAGE), layers)


def image_to_published(state: State) -> State:
    """The inverse of image_from_published, without what that leaves out."""
    return _to_published(state, _IMAGE)


def image_from_transformers(state: State, *, layers: int = 31) -> State:
    """ImageEncoder's tensors from a CLIPVisionModel's; what Wan never reads is left out."""
    used = {name.removeprefix("vision_model."): tensor for name, tensor in _used(state).items()}
    return _first_layers(used, layers)


def _used(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not _IMAGE_UNUSED.fullmatch(name)}


def _first_layers(state: State, layers: int) -> State:
    return {name: tensor for name, tensor in state.items() if int(take_number(name)[1] or 0) < layers}


def _find(name: str, known: Collection[str]) -> tuple[str, str]:
    """The name without its layer's number, and that number."""
    template, number = take_number(name)
    if template not in known:
        raise UserError(f"{name} is no tensor of this encoder: its file is damaged or another model's")
    return template, number


def _from_published(state: State, rules: Rules) -> State:
    ours: State = {}
    for name, tensor in state.items():
        published, number = _find(name, rules)
        parts = tensor.reshape(tensor.shape[_AXES.get(published, 0) :]).chunk(len(rules[published]))
        ours |= {part.format(number): x for part, x in zip(rules[published], parts, strict=True)}
    return ours


def _to_published(state: State, rules: Rules) -> State:
    whole = {part: published for published, parts in rules.items() for part in parts}
    result: State = {}
    for name in state:
        part, number = _find(name, whole)
        published = whole[part]
        if part == rules[published][0]:
            parts = [state[each.format(number)] for each in rules[published]]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
            axes = (1,) * _AXES.get(published, 0)
            result[published.format(number)] = tensor.reshape(axes + tensor.shape)
    return result
