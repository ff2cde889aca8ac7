import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from turbodiffusion.pipelines.conditioning import condition, known_frames, prepare
from turbodiffusion.pipelines.sizes import Size


def upstream_mask(frames: int, h: int, w: int, *, has_last: bool) -> Tensor:
    """Wan's construction, step by step: a frame indicator, its first entry four times, folded into fours."""
    indicator = torch.zeros(1, frames, h, w)
    indicator[:, 0] = 1
    if has_last:
        indicator[:, -1] = 1
    repeated = torch.cat([indicator[:, :1].repeat_interleave(4, dim=1), indicator[:, 1:]], dim=1)
    assert repeated.shape[1] == frames + 3
    return repeated.view(1, (frames + 3) // 4, 4, h, w).transpose(1, 2)  # (1, 4, T, h, w)


@pytest.mark.parametrize("frames", [1, 5, 33, 81])
@pytest.mark.parametrize("has_last", [False, True])
def test_mask_is_upstreams_and_comes_before_the_latents(frames: int, has_last: bool) -> None:
    if frames == 1 and has_last:
        return  # one frame has no last
    latents = torch.randn(2, 16, 1 + (frames - 1) // 4, 3, 5)
    y = condition(latents, has_last=has_last)
    assert y.shape[1] == 20
    assert torch.equal(y[:, :4], upstream_mask(frames, 3, 5, has_last=has_last).expand(2, -1, -1, -1, -1))
    assert torch.equal(y[:, 4:], latents)


def test_a_last_frame_marks_only_channel_three_of_the_last_latent() -> None:
    mask = condition(torch.zeros(1, 16, 21, 2, 2), has_last=True)[0, :4, :, 0, 0]
    assert mask[:, 0].tolist() == [1, 1, 1, 1]
    assert mask[:, -1].tolist() == [0, 0, 0, 1]
    assert mask[:, 1:-1].count_nonzero() == 0


def test_known_frames_are_grey_but_for_the_pictures() -> None:
    first, last = torch.rand(1, 3, 4, 6), torch.rand(1, 3, 4, 6)
    clip = known_frames(first, 9, last)
    assert clip.shape == (1, 3, 9, 4, 6)
    assert torch.equal(clip[:, :, 0], first)
    assert torch.equal(clip[:, :, -1], last)
    assert clip[:, :, 1:-1].count_nonzero() == 0  # 0 in [-1, 1] is mid-grey


def test_pictures_are_stretched_as_pillow_stretches_them() -> None:
    pixels = torch.randint(0, 256, (3, 50, 90), dtype=torch.uint8)
    ours = prepare(pixels, Size(48, 32))
    assert ours.shape == (1, 3, 32, 48)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    theirs = torch.from_numpy(np.array(image.resize((48, 32), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    # both round to whole values after each pass: at most one step of 1/255 apart, on a scale of 2
    assert (ours[0] - (theirs.float() / 255 * 2 - 1)).abs().max() <= 2 / 255 + 1e-6


def test_black_and_white_reach_the_ends_of_the_range() -> None:
    for value, wanted in ((0, -1.0), (255, 1.0)):
        assert (
            prepare(torch.full((3, 8, 8), value, dtype=torch.uint8), Size(16, 16)).unique().item() == wanted
        )
