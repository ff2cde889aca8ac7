"""Names of the text and image encoders' tensors: those of the published Wan files <-> ours.

Ours are transformers' names, less a second name for the text embedding and the prefix `vision_model.`.
A tensor must match one rule in full; any other raises.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from turbodiffusion.errors import UserError

State = dict[str, Tensor]


class Rule(NamedTuple):
    """A published tensor is `ours` concatenated, behind `axes` axes of size 1; {} is the layer's number."""

    published: str
    ours: tuple[str, ...]
    axes: int = 0


def _renames(kinds: tuple[str, ...], modules: dict[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(f"{a}.{kind}", (f"{b}.{kind}",)) for a, b in modules.items() for kind in kinds)


TEXT = _renames(
    ("weight",),
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
)

IMAGE = (
    Rule("visual.cls_embedding", ("embeddings.class_embedding",), axes=2),
    Rule("visual.pos_embedding", ("embeddings.position_embedding.weight",), axes=1),
    Rule("visual.patch_embedding.weight", ("embeddings.patch_embedding.weight",)),
    *_renames(
        ("weight", "bias"),
        {
            "visual.pre_norm": "pre_layrnorm",
            "visual.transformer.{}.norm1": "encoder.layers.{}.layer_norm1",
            "visual.transformer.{}.attn.proj": "encoder.layers.{}.self_attn.out_proj",
            "visual.transformer.{}.norm2": "encoder.layers.{}.layer_norm2",
            "visual.transformer.{}.mlp.0": "encoder.layers.{}.mlp.fc1",
            "visual.transformer.{}.mlp.2": "encoder.layers.{}.mlp.fc2",
        },
    ),
    *(
        Rule(
            f"visual.transformer.{{}}.attn.to_qkv.{kind}",
            tuple(f"encoder.layers.{{}}.self_attn.{x}_proj.{kind}" for x in "qkv"),
        )
        for kind in ("weight", "bias")
    ),
)

# what follows the last layer that Wan reads, and CLIP's text side
IMAGE_UNUSED = re.compile(
    r"textual\..+|log_scale|visual\.(head|post_norm\.(weight|bias))"
    r"|visual_projection\.weight|(vision_model\.)?(post_layernorm\.(weight|bias)|embeddings\.position_ids)"
)


def text_from_published(state: State) -> State:
    """TextEncoder's tensors from models_t5_umt5-xxl-enc-bf16.pth."""
    return _from_published(state, TEXT)


def text_to_published(state: State) -> State:
    """The inverse of text_from_published."""
    return _to_published(state, TEXT)


def text_from_transformers(state: State) -> State:
    """TextEncoder's tensors from a UMT5EncoderModel's: with either name of the embedding, or both."""
    ours = dict(state)
    shared = ours.pop("shared.weight", None)
    return ours if shared is None else {"encoder.embed_tokens.weight": shared} | ours


def image_from_published(state: State, *, layers: int = 31) -> State:
    """ImageEncoder's tensors from models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth.

    The text side, the head and the layers from number `layers` on are left out: Wan never reads them.
    """
    used = {name: tensor for name, tensor in state.items() if not IMAGE_UNUSED.fullmatch(name)}
    return _first_layers(_from_published(used, IMAGE), layers)


def image_to_published(state: State) -> State:
    """The inverse of image_from_published, without what that leaves out."""
    return _to_published(state, IMAGE)


def image_from_transformers(state: State, *, layers: int = 31) -> State:
    """ImageEncoder's tensors from a CLIPVisionModel's; what Wan never reads is left out."""
    used = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in state.items()
        if not IMAGE_UNUSED.fullmatch(name)
    }
    return _first_layers(used, layers)


def _first_layers(state: State, layers: int) -> State:
    def is_kept(name: str) -> bool:
        match = re.match(r"encoder\.layers\.(\d+)\.", name)
        return match is None or int(match[1]) < layers

    return {name: tensor for name, tensor in state.items() if is_kept(name)}


def _match(name: str, template: str) -> str | None:
    """The layer's number in `name`, "" where the template has none; None where they do not fit."""
    match = re.fullmatch(re.escape(template).replace(r"\{\}", r"(\d+)"), name)
    return match and "".join(match.groups())


def _find(name: str, sides: list[tuple[Rule, str]]) -> tuple[Rule, str]:
    """The rule one of whose templates fits `name`, and the layer's number."""
    for rule, template in sides:
        layer = _match(name, template)
        if layer is not None:
            return rule, layer
    raise UserError(f"{name} is no tensor of this encoder: its file is damaged or another model's")


def _from_published(state: State, rules: tuple[Rule, ...]) -> State:
    ours: State = {}
    for name, tensor in state.items():
        rule, layer = _find(name, [(rule, rule.published) for rule in rules])
        parts = tensor.reshape(tensor.shape[rule.axes :]).chunk(len(rule.ours))
        ours |= {part.format(layer): x for part, x in zip(rule.ours, parts, strict=True)}
    return ours


def _to_published(state: State, rules: tuple[Rule, ...]) -> State:
    published: State = {}
    for name in state:
        rule, layer = _find(name, [(rule, part) for rule in rules for part in rule.ours])
        if name == rule.ours[0].format(layer):
            parts = [state[part.format(layer)] for part in rule.ours]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
            published[rule.published.format(layer)] = tensor.reshape((1,) * rule.axes + tensor.shape)
    return published
