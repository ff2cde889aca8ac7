"""Motion with a network's place taken by what can be computed by hand."""

import pytest
import torch
from torch import Tensor

from evaluation.metrics.motion import is_dynamic, is_static, smoothness
from turbodiffusion.errors import UserError

H = W = 256  # thresholds are 6 pixels for dynamic videos, 3 for static ones


def grey(levels: list[int]) -> Tensor:
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, H, W, 3)


def brightening(one: Tensor, other: Tensor) -> Tensor:
    """A flow, to the right, of as many pixels as grey levels are gained."""
    across = other[:, 0] - one[:, 0]
    return torch.stack((across, torch.zeros_like(across)), dim=1)


@pytest.mark.parametrize(
    ("levels", "fps", "dynamic"),
    [
        ([0] * 16, 8.0, False),
        # of 16 frames 4 pairs must move
        ([0, 7, 14, 21, *[21] * 12], 8.0, False),
        ([0, 7, 14, 21, 28, *[28] * 11], 8.0, True),
        # the threshold itself is not fast
        ([*range(0, 96, 6)], 8.0, False),
        # every second frame at 16 a second: 8 of them, of which 2 pairs must move
        ([0, 4, 8, 12, 16, *[16] * 11], 16.0, True),
        ([0, 4, 8, *[8] * 13], 16.0, False),
        # 12 a second is every second one too: halves go to even
        ([0, 4, 8, 12, 16, *[16] * 11], 12.0, True),
        # two frames need no pair, but one to be asked after
        ([0, 0], 8.0, True),
        ([0], 8.0, False),
        ([0, 0], 16.0, False),
    ],
)
def test_dynamic_videos(levels: list[int], fps: float, dynamic: bool) -> None:
    assert is_dynamic(brightening, grey(levels), fps) is dynamic


@pytest.mark.parametrize(
    ("levels", "static"),
    [
        ([0] * 16, True),
        # of 16 frames two pairs may move fast, and the ends differ by 12
        ([0, 4, 8, *[8] * 13], True),
        ([0, 4, 8, 12, *[12] * 12], False),
        ([0, 6, 12, *[12] * 13], True),
        ([0, 6, 13, *[13] * 13], False),
        # of three frames none may, and the ends must be equal: 2 * 3 / 16 rounds to 0
        ([0, 0, 0], True),
        ([0, 1, 1], False),
    ],
)
def test_static_videos(levels: list[int], static: bool) -> None:
    assert is_static(brightening, grey(levels)) is static
    # the way back counts as well
    assert is_static(lambda one, other: brightening(other, one), grey(levels)) is static


def test_only_the_fastest_count() -> None:
    frames = grey([0, 0]).clone()
    # 5 % of the pixels, by 7
    fast = int(0.05 * H * W)
    frames[1].view(-1, 3)[:fast] = 7
    assert is_dynamic(brightening, frames.repeat(2, 1, 1, 1), 8.0)
    # 4 frames need one pair; with a few fewer fast ones the mean is below 6
    frames[1].view(-1, 3)[: fast // 6] = 0
    assert not is_dynamic(brightening, frames.repeat(2, 1, 1, 1), 8.0)


def test_frames_are_extended_evenly() -> None:
    seen = []

    def look(one: Tensor, other: Tensor) -> Tensor:
        seen.append(one)
        return torch.zeros_like(one[:, :2])

    frames = torch.randint(256, (2, 130, 133, 3)).byte()
    is_dynamic(look, frames, 8.0)
    (extended,) = seen
    assert extended.shape == (1, 3, 136, 136)
    assert torch.equal(extended[0, :, 3:133, 1:134].byte(), frames[0].movedim(-1, 0))
    assert torch.equal(extended[0, :, 0, 1:134], extended[0, :, 3, 1:134])
    assert torch.equal(extended[0, :, :, 135], extended[0, :, :, 133])


def mean(one: Tensor, other: Tensor) -> Tensor:
    # a tenth of a level more, lest fp32's rounding make whole levels fall short
    return (one + other) / 2 + 0.1 / 255


@pytest.mark.parametrize(
    ("levels", "error"),
    [
        ([9] * 5, 0),
        ([0, 10, 20, 30, 40], 0),
        # the last has no neighbour after it
        ([0, 10, 20, 99], 0),
        # 2.6 is cut off
        ([0, 2, 5], 0),
        ([0, 3, 5], 1),
        # 11 once, 1 once
        ([0, 21, 20, 31, 40], 6),
    ],
)
def test_smoothness(levels: list[int], error: float) -> None:
    frames = grey(levels)[:, :130, :133]
    # fp64's rounding
    assert smoothness(mean, frames) == pytest.approx(1 - error / 255, abs=1e-12)


def test_small_frames_are_refused() -> None:
    for measure in (lambda x: smoothness(mean, x), lambda x: is_static(brightening, x)):
        with pytest.raises(UserError, match="is 127 x 256, and motion is measured from 128 x 128 on"):
            measure(torch.zeros(3, 127, 256, 3).byte())
