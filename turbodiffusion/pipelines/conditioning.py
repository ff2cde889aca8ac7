"""What a picture becomes before it reaches the network.

I2V and FLF2V networks see y (B, 4 + z, T, h, w): four mask channels, then the encoded clip "first picture,
grey, ..., grey or last picture".  TI2V networks have no such channels: the encoded picture is their first
latent frame (samplers/denoiser.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from turbodiffusion.pipelines.sizes import TEMPORAL_FACTOR, Size

MASK_CHANNELS = 4


def prepare(picture: Tensor, size: Size) -> Tensor:
    """Pixels (3, H, W) uint8 -> (1, 3, height, width) fp32 in [-1, 1], stretched to the size.

    Bilinear with antialiasing on the uint8 values, as the TurboDiffusion models were fed.
    """
    shape = (size.height, size.width)
    resized = F.interpolate(picture[None], size=shape, mode="bilinear", antialias=True)
    return (resized.float() / 255 - 0.5) / 0.5


def known_frames(first: Tensor, frames: int, last: Tensor | None = None) -> Tensor:
    """(B, 3, H, W) -> the clip (B, 3, F, H, W) that a conditioned model is shown; unknown frames are grey."""
    clip = first.new_zeros(*first.shape[:2], frames, *first.shape[2:])
    clip[:, :, 0] = first
    if last is not None:
        clip[:, :, -1] = last
    return clip


def condition(latents: Tensor, *, has_last: bool) -> Tensor:
    """Encoded known frames (B, z, T, h, w) -> y (B, 4 + z, T, h, w), mask before latents.

    A mask channel is one pixel frame of the latent's four; the first latent holds the first frame only, which
    fills all four.  The last pixel frame is therefore channel 3 of the last latent.
    """
    b, _, t, h, w = latents.shape
    mask = latents.new_zeros(b, MASK_CHANNELS, t, h, w)
    mask[:, :, 0] = 1
    if has_last:
        mask[:, TEMPORAL_FACTOR - 1, -1] = 1
    return torch.cat((mask, latents), dim=1)
