"""How alike every place of one feature map is to every place of another, near where it is looked for.

Shapes: B pairs, C channels, h w places, r radius.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 4
LEAST = 128  # pixels, at an eighth of which the finest level is: below, the coarsest is one wide


def pyramid(one: Tensor, other: Tensor) -> list[Tensor]:
    """(B, C, h, w) twice -> a map of `other` for every place of `one`, (B h w, 1, h, w), then halved."""
    alike = one.flatten(2).mT @ other.flatten(2) / one.shape[1] ** 0.5
    levels = [alike.reshape(-1, 1, *other.shape[-2:])]
    for _ in range(LEVELS - 1):
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels


def look_up(levels: list[Tensor], places: Tensor, radius: int) -> Tensor:
    """Likeness around places (B, 2, h, w), x first, of the finest level -> (B, 4 (2 r + 1)^2, h, w).

    Windows run down first, then across.
    """
    batch, _, height, width = places.shape
    step = torch.arange(-radius, radius + 1, dtype=places.dtype, device=places.device)
    around = torch.stack(torch.meshgrid(step, step, indexing="ij"), dim=-1)
    centre = places.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
    windows = [
        sampled(level, centre / 2**i + around, "zeros").view(batch, height, width, -1)
        for i, level in enumerate(levels)
    ]
    return torch.cat(windows, dim=-1).permute(0, 3, 1, 2)


def sampled(x: Tensor, places: Tensor, beyond: str) -> Tensor:
    """x (B, C, H, W) at places (B, h, w, 2), in pixels, x first -> (B, C, h, w)."""
    size = torch.tensor(x.shape[:-3:-1], dtype=places.dtype, device=places.device)  # width, height
    return F.grid_sample(x, 2 * places / (size - 1) - 1, padding_mode=beyond, align_corners=True)


def grid(x: Tensor) -> Tensor:
    """Where the pixels of (..., H, W) are: (1, 2, H, W), x first."""
    down, across = (torch.arange(n, dtype=torch.float32, device=x.device) for n in x.shape[-2:])
    return torch.stack(torch.meshgrid(across, down, indexing="xy"))[None]
