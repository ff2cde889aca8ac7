"""Features of frames, and how alike every place of one is to places of another, near where it is looked for.

Shapes: B pairs, C channels, h w places, r radius.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 4
LEAST = 128  # pixels, at an eighth of which the finest level is: below, the coarsest is one wide


class Encoder(nn.Module):
    """Frames (B, 3, H, W) -> (B, out, H / 8, W / 8); block: of channels, out and stride."""

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module],
        norm: Callable[[int], nn.Module],
        *,
        widths: tuple[int, int, int],
        out: int,
    ):
        super().__init__()
        a, b, c = widths
        self.conv1, self.norm1, self.conv2 = nn.Conv2d(3, a, 7, 2, 3), norm(a), nn.Conv2d(c, out, 1)
        self.layer1 = nn.Sequential(block(a, a, 1), block(a, a, 1))
        self.layer2 = nn.Sequential(block(a, b, 2), block(b, b, 1))
        self.layer3 = nn.Sequential(block(b, c, 2), block(c, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


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
