"""Clips as one picture to look at."""

from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

FRAME_MS = 125  # the small world's 8 frames a second


def save_preview(clips: Tensor, path: Path) -> None:
    """Write clips (rows, columns, 3, F, H, W) in [-1, 1] as an animation, path.webp, and as stills, path.png.

    The stills put each clip's first, middle and last frame side by side.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = ((clips.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    frames = rearrange(pixels, "r c k f h w -> f (r h) (c w) k")
    first, *rest = (Image.fromarray(frame.numpy()) for frame in frames)
    animation = {"save_all": True, "append_images": rest, "duration": FRAME_MS, "loop": 0, "quality": 90}
    first.save(path.with_suffix(".webp"), **animation)
    count = pixels.shape[3]
    stills = rearrange(pixels[:, :, :, [0, count // 2, count - 1]], "r c k f h w -> (r h) (c f w) k")
    Image.fromarray(stills.numpy()).save(path.with_suffix(".png"))
