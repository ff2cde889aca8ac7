"""Checkpoints of every published format to modules, and modules to safetensors that describe themselves."""

from turbodiffusion.checkpoints.detect import detect
from turbodiffusion.checkpoints.loading import (
    LoadedNetwork,
    load_image_encoder,
    load_network,
    load_text_encoder,
    load_vae,
)
from turbodiffusion.checkpoints.locate import locate
from turbodiffusion.checkpoints.metadata import Report
from turbodiffusion.checkpoints.saving import save

__all__ = [
    "LoadedNetwork",
    "Report",
    "detect",
    "load_image_encoder",
    "load_network",
    "load_text_encoder",
    "load_vae",
    "locate",
    "save",
]
