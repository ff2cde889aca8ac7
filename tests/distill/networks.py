"""A small network of which every part says something."""

import torch

from turbodiffusion.attention import Attention
from turbodiffusion.models.wan import WanModel


def build_network(*, clip_tokens: int = 0, attention: Attention | None = None) -> WanModel:
    model = WanModel(
        dim=64, ffn_dim=80, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=12, text_length=6,
        freq_dim=16, clip_tokens=clip_tokens, attention=attention,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            # away from the neutral initial values, of which the zero head would hide every tangent
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
