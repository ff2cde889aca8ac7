"""Rotary positions against their defining complex rotation."""

import torch

from kernels.reference_norms import rotate
from turbodiffusion.models.rope import rotary_table


def test_rotation_equals_complex_multiplication_in_fp64() -> None:
    grid, dim = (3, 4, 5), 16
    x = torch.randn(2, 60, 3, dim)
    out = rotate(x, *rotary_table(grid, dim, x.device))
    # by definition pair j of an axis of width m turns by position * 10000^(-2j/m); widths 16 - 2 * 4, 4, 4
    angles = torch.zeros(60, dim // 2, dtype=torch.float64)
    for token in range(60):
        t, h, w = token // 20, token // 5 % 4, token % 5
        axis = [(t, 8, j) for j in range(4)] + [(h, 4, j) for j in range(2)] + [(w, 4, j) for j in range(2)]
        angles[token] = torch.tensor([p * 10000 ** (-2 * j / m) for p, m, j in axis], dtype=torch.float64)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)
    # fp32 rounding of one multiply-add
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_scores_depend_on_relative_position_only() -> None:
    cos, sin = rotary_table((9, 1, 1), 12, torch.device("cpu"))
    q, k = torch.randn(1, 1, 1, 12).expand(1, 9, 1, 12), torch.randn(1, 1, 1, 12).expand(1, 9, 1, 12)
    scores = rotate(q, cos, sin)[0, :, 0] @ rotate(k, cos, sin)[0, :, 0].T
    for offset in range(-8, 9):
        diagonal = scores.diagonal(offset)
        # fp32 dot product of 12 terms
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)


def test_published_head_width_splits_44_42_42() -> None:
    cos, _ = rotary_table((2, 2, 2), 128, torch.device("cpu"))
    first_frame, second_frame = cos[0, 0], cos[4, 0]
    moved = (first_frame != second_frame).nonzero().flatten()
    assert moved.max() < 22  # 44 channels are 22 pairs
    assert cos.shape == (8, 1, 64)
