"""What networks see of frames: resized, cropped and standardised as VBench does it, to the rounding.

Pixels are (F, H, W, 3) uint8; results (F, 3, h, w) fp32.  Only PIL smooths before it makes frames smaller.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from turbodiffusion.models.clip import MEAN, STD

CLIP, IMAGENET = (MEAN, STD), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SIDE = 224


def planes(pixels: Tensor) -> Tensor:
    """(F, 3, H, W) fp32 in [0, 255]."""
    return pixels.movedim(-1, 1).float()


def resize(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(F, 3, H, W) -> (F, 3, *size)."""
    return F.interpolate(x, size, mode=mode, align_corners=False)


def shorter_side(height: int, width: int, side: int = _SIDE) -> tuple[int, int]:
    """Height and width at which the shorter is `side`, the longer rounded down."""
    return tuple(int(side * each / min(height, width)) for each in (height, width))


def middle_square(x: Tensor, side: int = _SIDE) -> Tensor:
    """The middle (F, 3, side, side) of (F, 3, H, W)."""
    # Python rounds halves to even, and so does torchvision's crop
    top, left = (round((length - side) / 2) for length in x.shape[-2:])
    return x[..., top : top + side, left : left + side]


def padded(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """(B, C, ...) with zeros around, so that ceil(length / stride) windows fit; an odd zero comes last."""
    sizes = zip(x.shape[2:], kernel, stride, strict=True)
    lacking = [max(0, -(-length // s) * s - s + k - length) for length, k, s in sizes]
    return F.pad(x, [each for n in reversed(lacking) for each in (n // 2, n - n // 2)])


def extended(x: Tensor, multiple: int) -> tuple[Tensor, tuple[slice, ...]]:
    """(F, C, H, W) with its edges repeated until H and W are multiples; and where the frame is in it."""
    height, width = x.shape[-2:]
    down, across = -height % multiple, -width % multiple
    top, left = down // 2, across // 2
    frame = (..., slice(top, top + height), slice(left, left + width))
    return F.pad(x, (left, across - left, top, down - top), mode="replicate"), frame


def standardise(x: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """[0, 255] -> mean 0 and deviation 1 of what the network was trained on."""
    mean, std = torch.tensor(statistics, device=x.device)[..., None, None]
    return (x / 255 - mean) / std


def for_clip(pixels: Tensor, *, is_rounded: bool = False) -> Tensor:
    """The middle square, bicubic.  is_rounded: through uint8 again, without overshoot."""
    x = resize(planes(pixels), shorter_side(*pixels.shape[1:3]), "bicubic")
    return standardise(middle_square(x.clamp(0, 255).round() if is_rounded else x), CLIP)


def for_clip_by_pil(pixels: Tensor) -> Tensor:
    """The middle square, bicubic with smoothing."""
    height, width = shorter_side(*pixels.shape[1:3])
    pictures = [
        Image.fromarray(frame).resize((width, height), Image.BICUBIC) for frame in pixels.cpu().numpy()
    ]
    x = planes(torch.from_numpy(np.stack(pictures))).to(pixels.device)
    return standardise(middle_square(x), CLIP)


def for_dino(pixels: Tensor) -> Tensor:
    """The whole frame, bilinear."""
    return standardise(resize(planes(pixels), shorter_side(*pixels.shape[1:3]), "bilinear"), IMAGENET)


def for_musiq(pixels: Tensor, most: int = 512) -> Tensor:
    """In [0, 1], the longer side at most 512, bilinear."""
    x, longer = planes(pixels), max(pixels.shape[1:3])
    if longer > most:
        x = resize(x, tuple(int(most / longer * each) for each in pixels.shape[1:3]), "bilinear")
    return x / 255


def for_umt(pixels: Tensor) -> Tensor:
    """The middle square after the shorter side was made 256, bilinear; within 1 of OpenCV's, as upstream."""
    x = resize(planes(pixels), shorter_side(*pixels.shape[1:3], 256), "bilinear").round()
    return standardise(middle_square(x), IMAGENET)
