"""Metrics on videos whose score is known."""

from collections.abc import Callable
from math import log10

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from evaluation.metrics import METRICS, make_metrics
from evaluation.metrics.motion import TemporalFlickering
from evaluation.metrics.paired import PSNR, SSIM
from evaluation.metrics.small_world import SmallWorld, meaning
from evaluation.records import Score
from evaluation.videos import Footage
from turbodiffusion.errors import UserError
from turbodiffusion.small_world.captions import PHRASINGS, caption, captions
from turbodiffusion.small_world.clips import draw_scenes, render
from turbodiffusion.small_world.split import BACKGROUNDS, MOTIONS, SUBJECTS
from turbodiffusion.small_world.sprites import load_sprites, subject_names

Make = Callable[..., Footage]


def flickering(made: Footage) -> float:
    return TemporalFlickering().score(made).value


def picture() -> Tensor:
    """A smooth random picture (48, 64, 3), which its shifts differ from the more the further."""
    small = torch.rand(1, 3, 4, 5)
    return (
        (255 * torch.nn.functional.interpolate(small, size=(48, 64), mode="bilinear")[0])
        .byte()
        .movedim(0, -1)
    )


def test_a_still_video_does_not_flicker(footage: Make) -> None:
    assert flickering(footage(picture().expand(5, -1, -1, -1))) == 1.0


def test_black_and_white_flicker_most(footage: Make) -> None:
    frames = torch.tensor([0, 255, 0, 255]).byte()[:, None, None, None].expand(-1, 16, 16, 3)
    assert flickering(footage(frames)) == 0.0


@pytest.mark.parametrize("step", [1, 7, 60])
def test_constant_steps(footage: Make, step: int) -> None:
    frames = (step * torch.arange(5)).byte()[:, None, None, None].expand(-1, 16, 16, 3)
    # one rounding of fp64
    assert flickering(footage(frames)) == pytest.approx(1 - step / 255, abs=1e-15)


def test_noise(footage: Make) -> None:
    score = flickering(footage(torch.randint(256, (16, 64, 64, 3)).byte()))
    # the mean |a - b| of integers below n is (n^2 - 1) / 3n.  Its deviation is 60, and that of 184320 pairs,
    # which share a number with two others, less than twice 60 / sqrt(184320): four of those
    assert score == pytest.approx(1 - (256**2 - 1) / (3 * 256) / 255, abs=4 * 2 * 60 / 184320**0.5 / 255)


def test_a_rolled_picture(footage: Make) -> None:
    image, scores = picture(), []
    for step in (1, 3, 6):
        frames = torch.stack([image.roll(step * i, 1) for i in range(4)])
        scores.append(flickering(footage(frames)))
        error = (image.double() - image.roll(step, 1).double()).abs().mean() / 255
        # every pair differs alike; sums of integers are exact
        assert scores[-1] == pytest.approx(1 - float(error), abs=1e-14)
    assert scores == sorted(scores, reverse=True)


def test_psnr_of_a_constant_error(footage: Make) -> None:
    pixels = torch.randint(10, 240, (3, 16, 16, 3)).byte()
    score = PSNR().score(footage(pixels + 5, pixels))
    # a few roundings of fp64
    assert score.value == pytest.approx(20 * log10(255 / 5), rel=1e-14)
    assert score.extras == {"identical_frames": 0}


def test_psnr_of_identical_frames_is_bounded_and_counted(footage: Make) -> None:
    pixels = torch.randint(10, 240, (2, 16, 16, 3)).byte()
    other = pixels.clone()
    other[1] += 5
    score = PSNR().score(footage(other, pixels))
    assert score.value == pytest.approx((100 + 20 * log10(255 / 5)) / 2, rel=1e-14)
    assert score.extras == {"identical_frames": 1}


def test_ssim_agrees_with_torchmetrics(footage: Make) -> None:
    pixels = picture().expand(3, -1, -1, -1)
    noisy = (pixels.int() + torch.randint(-40, 40, pixels.shape)).clamp(0, 255).byte()
    x, y = (frames.movedim(-1, 1).double() / 255 for frames in (noisy, pixels))
    _, image = structural_similarity_index_measure(x, y, sigma=1.5, data_range=1.0, return_full_image=True)
    # it mirrors what lies beyond the border; ours looks only at whole windows
    other = image[..., 5:-5, 5:-5].mean()
    # both fp64: variances of 1e-3 are differences of squares near 1, good to 1e-16 each
    assert SSIM().score(footage(noisy, pixels)).value == pytest.approx(float(other), abs=1e-11)


def test_ssim_of_constants(footage: Make) -> None:
    one, other = (torch.full((2, 16, 16, 3), value, dtype=torch.uint8) for value in (51, 204))
    # without structure only the means count: (2 a b + c) / (a^2 + b^2 + c), a = 0.2, b = 0.8; fp64
    exact = (2 * 0.2 * 0.8 + 1e-4) / (0.2**2 + 0.8**2 + 1e-4)
    assert SSIM().score(footage(one, other)).value == pytest.approx(exact, abs=1e-11)
    assert SSIM().score(footage(one, one)).value == 1.0
    with pytest.raises(UserError, match="11 x 11 window"):
        SSIM().score(footage(one[:, :8], other[:, :8]))


def test_the_small_world_is_read(footage: Make) -> None:
    scenes, sprites = draw_scenes(4, torch.Generator().manual_seed(3)), load_sprites()
    texts = captions(scenes, sprites.names, torch.arange(4))
    metric = SmallWorld()
    for clip, text in zip(render(scenes, sprites), texts, strict=True):
        pixels = ((clip + 1) * 127.5).round().byte().permute(1, 2, 3, 0)
        assert metric.score(footage(pixels, prompt=text)) == Score(
            1.0, extras={"subject": True, "motion": True, "background": True}
        )
        subject, motion, background = meaning(text)
        other = caption(sprites.names[subject], (motion + 1) % len(MOTIONS), background)
        assert metric.score(footage(pixels, prompt=other)) == Score(
            0.0, extras={"subject": True, "motion": False, "background": True}
        )


def test_captions_have_one_meaning() -> None:
    names = subject_names()
    for i in range(0, 100, 7):
        wanted = i % SUBJECTS, i % len(MOTIONS), i % len(BACKGROUNDS)
        assert meaning(caption(names[wanted[0]], *wanted[1:], i % PHRASINGS)) == wanted
    with pytest.raises(UserError, match="no caption of the small world"):
        meaning("a cat on a mat")


def test_counting_one_by_one_is_counting_together() -> None:
    scores = [Score(0.25), Score(3.0, units=4), Score(0.0, units=0)]
    one, other, both = (TemporalFlickering() for _ in range(3))
    one.update(scores[0])
    for score in scores[1:]:
        other.update(score)
    for score in scores:
        both.update(score)
    one.merge_state(other)
    assert one.compute() == both.compute() == 3.25 / 5
    both.reset()
    assert both.units == 0


def test_unknown_metrics_are_named() -> None:
    needing_none = [name for name, each in METRICS.items() if not each.weights]
    assert list(make_metrics(needing_none)) == needing_none
    with pytest.raises(
        UserError, match=r"beauty, i2v_subject \(a dimension of VBench, but not scored here\); choose"
    ):
        make_metrics(["psnr", "beauty", "i2v_subject"])
    with pytest.raises(UserError, match="scores nothing"):
        make_metrics([])
