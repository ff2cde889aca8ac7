"""Rotary positions of video tokens on a (T, H, W) grid (Wan: arXiv:2503.20314)."""

import torch
from torch import Tensor

THETA = 10000.0


# else the compiler computes these fp64 sines again in every kernel that rotates: a fifth of a small network
@torch.compiler.disable
def rotary_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (L, 1, head_dim / 2), fp32, of every token's rotation angles; L = T * H * W, row-major.

    2 * (head_dim // 6) channels turn with the row, as many with the column, the rest with the frame.
    Angles are computed in fp64: at position 1000 an fp32 angle is off by 6e-5 rad.
    """
    side = 2 * (head_dim // 6)
    angles = [
        torch.outer(torch.arange(size, device=device, dtype=torch.float64), _frequencies(width, device))
        for size, width in zip(grid, (head_dim - 2 * side, side, side), strict=True)
    ]
    t, h, w = grid
    table = torch.cat(
        [
            angles[0].view(t, 1, 1, -1).expand(t, h, w, -1),
            angles[1].view(1, h, 1, -1).expand(t, h, w, -1),
            angles[2].view(1, 1, w, -1).expand(t, h, w, -1),
        ],
        dim=-1,
    ).reshape(t * h * w, 1, head_dim // 2)
    return table.cos().float(), table.sin().float()


def _frequencies(width: int, device: torch.device) -> Tensor:
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float64) / width
    return THETA**-exponents
