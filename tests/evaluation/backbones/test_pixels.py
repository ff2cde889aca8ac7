"""Resizing, cropping and padding."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from evaluation.backbones.pixels import (
    CLIP,
    IMAGENET,
    for_clip,
    for_clip_by_pil,
    for_dino,
    for_musiq,
    for_umt,
    middle_square,
    padded,
    resize,
    shorter_side,
)


def undone(x: Tensor, statistics: tuple[tuple[float, ...], ...]) -> Tensor:
    mean, std = torch.tensor(statistics)[..., None, None]
    return (x * std + mean) * 255


@pytest.mark.parametrize(
    ("size", "dino", "musiq"),
    [
        ((480, 832), (224, 388), (295, 512)),
        ((720, 1280), (224, 398), (288, 512)),
        ((832, 480), (388, 224), (512, 295)),
        ((300, 500), (224, 373), (300, 500)),
    ],
)
def test_sizes(size: tuple[int, int], dino: tuple[int, int], musiq: tuple[int, int]) -> None:
    pixels = torch.zeros(1, *size, 3).byte()
    assert for_dino(pixels).shape[2:] == dino
    assert for_musiq(pixels).shape[2:] == musiq
    for look in (for_clip, for_clip_by_pil, for_umt):
        assert look(pixels).shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("look", "statistics", "side"),
    [(for_clip, CLIP, 672), (for_dino, IMAGENET, 672), (for_umt, IMAGENET, 768)],
)
def test_nothing_is_smoothed_before_it_is_made_smaller(
    look: Callable[[Tensor], Tensor], statistics: tuple[tuple[float, ...], ...], side: int
) -> None:
    """At a third of the size every third pixel is taken as it is."""
    stripes = torch.zeros(1, side, side, 3).byte()
    stripes[:, :, 1::3] = 240
    # fp32's rounding of standardising and back
    torch.testing.assert_close(
        undone(look(stripes), statistics), torch.full((1, 3, 224, 224), 240.0), atol=1e-3, rtol=0
    )


def test_pil_smooths() -> None:
    stripes = torch.zeros(1, 672, 672, 3).byte()
    stripes[:, :, 1::3] = 240
    # a third of 240; PIL rounds to levels, and stripes at the borders lack a neighbour
    assert (undone(for_clip_by_pil(stripes), CLIP)[..., 2:-2] - 80).abs().max() < 1


def test_bicubic_overshoot_is_kept_for_floats_and_cut_for_whole_numbers() -> None:
    """At half the size, weights of a = -0.75 at half a pixel: -0.09375, 0.59375 and again."""
    edge = torch.zeros(1, 448, 448, 3).byte()
    edge[:, :, 226:] = 255
    # the windows of 112 and 113 are pixels 223 to 226 and 225 to 228
    wanted = 255 * torch.tensor([-0.09375, 1 + 0.09375])
    for is_rounded, row in ((False, wanted), (True, wanted.clamp(0, 255))):
        seen = undone(for_clip(edge, is_rounded=is_rounded), CLIP)[0, :, 100, 112:114]
        # fp32's rounding of standardising and back
        torch.testing.assert_close(seen, row.expand(3, -1), atol=1e-3, rtol=0)
    levels = undone(for_clip(torch.randint(256, (1, 300, 400, 3)).byte(), is_rounded=True), CLIP)
    torch.testing.assert_close(levels, levels.round().clamp(0, 255), atol=1e-3, rtol=0)


def test_the_middle_is_cut_out_where_torchvision_does() -> None:
    x = torch.arange(229.0).expand(1, 1, 227, 229)
    # (229 - 224) / 2 = 2.5 and (227 - 224) / 2 = 1.5 round to 2
    assert middle_square(x)[0, 0, 0, 0] == 2
    assert middle_square(x.mT)[0, 0, 0, 0] == 2
    assert shorter_side(480, 832, 256) == (256, 443)


def test_zeros_come_as_in_tensorflow() -> None:
    x = torch.ones(1, 1, 5, 6, 7)
    y = padded(x, (3, 3, 3), (2, 2, 2))
    # 5 and 7 need two more, 6 one, which comes last
    assert y.shape[2:] == (7, 7, 9)
    assert y[0, 0, 3, 3].tolist() == [0, *[1] * 7, 0]
    assert y[0, 0, 3, :, 4].tolist() == [*[1] * 6, 0]
    assert torch.equal(padded(x, (1, 2, 7), (1, 2, 7)), x)


def test_resizing_to_the_same_size_changes_nothing() -> None:
    x = torch.rand(1, 3, 20, 30) * 255
    for mode in ("bilinear", "bicubic"):
        assert torch.equal(resize(x, (20, 30), mode), x)
