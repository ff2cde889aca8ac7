"""The CLIP image encoder (arXiv:2103.00020) of Wan2.1's image-to-video models: open-clip's ViT-H/14.

Shapes: B images, H W height and width, E width, tokens = 1 + patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from turbodiffusion.errors import UserError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ImageEncoder(nn.Module):
    """Images -> tokens (B, 257, 1280).

    Wan reads the tokens after 31 of the 32 layers, before the final norm: nothing later is built.
    Parameters are named as in transformers' CLIPVisionModel, without the prefix `vision_model.`.
    """

    def __init__(
        self,
        *,
        dim: int = 1280,
        ffn_dim: int = 5120,
        heads: int = 16,
        layers: int = 31,
        patch: int = 14,
        size: int = 224,
    ):
        super().__init__()
        self.size = size
        self.config = {
            "dim": dim,
            "ffn_dim": ffn_dim,
            "heads": heads,
            "layers": layers,
            "patch": patch,
            "size": size,
        }
        sizes = CLIPVisionConfig(
            hidden_size=dim,
            intermediate_size=ffn_dim,
            num_attention_heads=heads,
            num_hidden_layers=layers,
            patch_size=patch,
            image_size=size,
            hidden_act="gelu",
        )
        model = CLIPVisionModel(sizes)
        tower = getattr(model, "vision_model", model)  # nested before transformers 5
        self.embeddings, self.pre_layrnorm, self.encoder = tower.embeddings, tower.pre_layrnorm, tower.encoder
        # a buffer outside the state dict would stay on the meta device; _embed does without
        self.embeddings.position_ids = None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Tokens (B, 1 + patches, E), in the parameters' dtype, of images (B, 3, H, W) in [-1, 1]."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise UserError(
                f"got images {tuple(images.shape)} of {images.dtype}, wanted floats (B, 3, H, W) in [-1, 1]"
            )
        tokens = self.pre_layrnorm(self._embed(self._prepare(images)))
        return self.encoder(inputs_embeds=tokens).last_hidden_state

    def _prepare(self, images: Tensor) -> Tensor:
        """Squeezed to a square whatever the aspect, and standardised; fp32 in case the weights are not."""
        device = self.embeddings.class_embedding.device
        mean, std = torch.tensor((MEAN, STD), device=device)[..., None, None]
        images = images.to(device, torch.float32)
        images = F.interpolate(images, (self.size, self.size), mode="bicubic", align_corners=False)
        return (images * 0.5 + 0.5 - mean) / std

    def _embed(self, pixels: Tensor) -> Tensor:
        parts = self.embeddings
        patches = parts.patch_embedding(pixels.to(parts.patch_embedding.weight.dtype)).flatten(2).mT
        first = parts.class_embedding.expand(len(patches), 1, -1)
        return torch.cat((first, patches), dim=1) + parts.position_embedding.weight
