"""Our encoders' tensors as the published files lay them out."""

import torch
from torch import Tensor


def published_image_encoder(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """An ImageEncoder's tensors with the names and shapes of the open-clip file's visual side."""
    published = {
        "visual.cls_embedding": ours["embeddings.class_embedding"][None, None],
        "visual.pos_embedding": ours["embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": ours["embeddings.patch_embedding.weight"],
    }
    modules = {
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "self_attn.out_proj": "attn.proj",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
    }
    for leaf in ("weight", "bias"):
        published[f"visual.pre_norm.{leaf}"] = ours[f"pre_layrnorm.{leaf}"]
        for n in {int(name.split(".")[2]) for name in ours if name.startswith("encoder.layers.")}:
            mine, theirs = f"encoder.layers.{n}", f"visual.transformer.{n}"
            for one, other in modules.items():
                published[f"{theirs}.{other}.{leaf}"] = ours[f"{mine}.{one}.{leaf}"]
            rows = [ours[f"{mine}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            published[f"{theirs}.attn.to_qkv.{leaf}"] = torch.cat(rows)
    return published
