"""Names of the text and image encoders' tensors: those of the published Wan files <-> ours.

Ours are transformers' names, less a second name for the text embedding and the prefix `vision_model.`.
A published tensor must have a name of the table; any other raises.
"""

import re
from typing import TypeVar

from torch import Tensor

from turbodiffusion.checkpoints.keys import inverse, rename, take_number, with_leaves
from turbodiffusion.errors import UserError

Stored = TypeVar("Stored")

_TEXT = with_leaves(
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
    }
)
_IMAGE = with_leaves(
    {
        "visual.cls_embedding": "embeddings.class_embedding",
        "visual.pos_embedding": "embeddings.position_embedding.weight",
        "visual.patch_embedding": "embeddings.patch_embedding",
        "visual.pre_norm": "pre_layrnorm",
        "visual.transformer.{}.norm1": "encoder.layers.{}.layer_norm1",
        # q, k and v once their rows, which lie in one to_qkv, are apart
        **{f"visual.transformer.{{}}.attn.to_{x}": f"encoder.layers.{{}}.self_attn.{x}_proj" for x in "qkv"},
        "visual.transformer.{}.attn.proj": "encoder.layers.{}.self_attn.out_proj",
        "visual.transformer.{}.norm2": "encoder.layers.{}.layer_norm2",
        "visual.transformer.{}.mlp.0": "encoder.layers.{}.mlp.fc1",
        "visual.transformer.{}.mlp.2": "encoder.layers.{}.mlp.fc2",
    }
)
# what follows the last layer that Wan reads, and CLIP's text side
_IMAGE_UNUSED = re.compile(
    r"textual\..+|log_scale|visual\.(head|post_norm\.(weight|bias))"
    r"|visual_projection\.weight|(vision_model\.)?(post_layernorm\.(weight|bias)|embeddings\.position_ids)"
)


def text_from_published(state: dict[str, Stored]) -> dict[str, Stored]:
    """TextEncoder's tensors from models_t5_umt5-xxl-enc-bf16.pth."""
    return {_known(name, _TEXT): stored for name, stored in state.items()}


def text_to_published(state: dict[str, Stored]) -> dict[str, Stored]:
    """The inverse of text_from_published."""
    table = inverse(_TEXT)
    return {_known(name, table): stored for name, stored in state.items()}


def text_from_transformers(state: dict[str, Stored]) -> dict[str, Stored]:
    """TextEncoder's tensors from a UMT5EncoderModel's: with either name of the embedding, or both."""
    second = {"shared.weight": "encoder.embed_tokens.weight"}
    return {second.get(name, name): stored for name, stored in state.items()}


def image_from_published(state: dict[str, Tensor], *, layers: int = 31) -> dict[str, Tensor]:
    """ImageEncoder's tensors from models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth.

    The text side, the head and the layers from number `layers` on are left out: Wan never reads them.
    """
    ours = {}
    for name, tensor in image_from_transformers(state, layers=layers).items():
        # the embeddings of class and position have axes of size 1 in front
        parts = {name: tensor.squeeze() if name.endswith("_embedding") else tensor}
        if ".to_qkv." in name:
            parts = {name.replace("qkv", x): part for x, part in zip("qkv", tensor.chunk(3), strict=True)}
        ours |= {_known(part, _IMAGE): tensor for part, tensor in parts.items()}
    return ours


def image_from_transformers(state: dict[str, Stored], *, layers: int = 31) -> dict[str, Stored]:
    """ImageEncoder's tensors from a CLIPVisionModel's; what Wan never reads is left out."""
    used = {name: stored for name, stored in state.items() if not _IMAGE_UNUSED.fullmatch(name)}
    used = {name.removeprefix("vision_model."): stored for name, stored in used.items()}
    return {name: stored for name, stored in used.items() if int(take_number(name)[1] or 0) < layers}


def _known(name: str, table: dict[str, str]) -> str:
    found = rename(name, table)
    if found is None:
        raise UserError(f"{name} is no tensor of this encoder: its file is damaged or another model's")
    return found
