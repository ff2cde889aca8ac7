import pytest
import torch
from torch import Tensor

from evaluation.motion import classify
from evaluation.oracle import Oracle, accuracy, degrade
from turbodiffusion.errors import UserError
from turbodiffusion.small_world.clips import Scenes, background_rows, draw_scenes, render, trajectories
from turbodiffusion.small_world.sprites import Sprites, load_sprites


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    return load_sprites()


@pytest.fixture(scope="module")
def oracle(sprites: Sprites) -> Oracle:
    return Oracle(sprites)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes(96, torch.Generator().manual_seed(11), "held_out_combinations")


@pytest.fixture(scope="module")
def clips(scenes: Scenes, sprites: Sprites) -> Tensor:
    return render(scenes, sprites)


def _truth(scenes: Scenes) -> Tensor:
    return torch.stack((scenes.subject, scenes.motion, scenes.background), dim=1)


def test_reads_held_out_clips(oracle: Oracle, scenes: Scenes, clips: Tensor) -> None:
    result = accuracy(oracle.read(clips), _truth(scenes))
    # the bar that its readings of generated clips rest on
    assert min(result.subject, result.motion, result.background) >= 0.97


def test_reads_blurred_and_noisy_clips(oracle: Oracle, scenes: Scenes, clips: Tensor) -> None:
    damaged = degrade(clips[:32], torch.Generator().manual_seed(0), blur=1.0, noise=0.05)
    result = accuracy(oracle.read(damaged), _truth(scenes[:32]))
    assert min(result.subject, result.motion, result.background) >= 0.93  # 2 of 32 may be unclear


def test_reads_subjects_never_trained(oracle: Oracle, sprites: Sprites) -> None:
    scenes = draw_scenes(24, torch.Generator().manual_seed(2), "held_out_subjects")
    result = accuracy(oracle.read(render(scenes, sprites)), _truth(scenes))
    assert min(result.subject, result.motion, result.background) >= 0.95  # 1 of 24


def test_reading_does_not_depend_on_the_batch(oracle: Oracle, clips: Tensor) -> None:
    together = oracle.read(clips[:4])
    alone = [oracle.read(clips[i : i + 1])[0] for i in range(4)]
    assert [(r.subject, r.motion, r.background) for r in together] == [
        (r.subject, r.motion, r.background) for r in alone
    ]


@pytest.mark.parametrize("amplitude", [0.3, 1.0, 3.0])
def test_noise_is_unclear(amplitude: float, oracle: Oracle) -> None:
    noise = amplitude * torch.randn(4, 3, 33, 128, 128, generator=torch.Generator().manual_seed(0))
    for reading in oracle.read(noise):
        assert (reading.subject, reading.motion, reading.background) == (None, None, None)


def test_empty_backgrounds_show_no_subject_and_no_motion(oracle: Oracle) -> None:
    rows = 2 * background_rows(torch.arange(16), torch.zeros(16, 3)) - 1
    readings = oracle.read(rows[:, :, None, :, None].expand(16, 3, 33, 128, 128))
    assert [reading.background for reading in readings] == list(range(16))
    assert all(reading.subject is None and reading.motion is None for reading in readings)


def test_a_smear_of_the_right_colour_is_no_subject(oracle: Oracle, scenes: Scenes, clips: Tensor) -> None:
    """A disc of the sprite's mean colour takes the sprite's path."""
    few = scenes[:32]
    centre, size = trajectories(few)
    axis = torch.arange(128) + 0.5
    x, y = (axis - centre[..., 0, None]).square(), (axis - centre[..., 1, None]).square()
    disc = (x[:, :, None] + y[..., None] < (0.4 * size).square()[..., None, None])[:, None].float()
    colour = (clips[:32] * disc).sum(dim=(2, 3, 4), keepdim=True) / disc.sum(dim=(2, 3, 4), keepdim=True)
    backdrop = (2 * background_rows(few.background, few.tint) - 1)[:, :, None, :, None]
    result = accuracy(oracle.read(torch.lerp(backdrop.expand_as(clips[:32]), colour, disc)), _truth(few))
    assert result.subject <= 0.05  # chance is 1/72; one lucky disc of 32 may pass
    assert result.background >= 0.97


def test_two_subjects_in_one_are_not_read_as_either(oracle: Oracle, scenes: Scenes, clips: Tensor) -> None:
    blend = (clips[:32] + clips[:32].roll(1, dims=0)) / 2
    assert accuracy(oracle.read(blend), _truth(scenes[:32])).all_three <= 0.05


def test_motion_is_read_off_exact_trajectories() -> None:
    scenes = draw_scenes(900, torch.Generator().manual_seed(5))
    motion, confidence = classify(*trajectories(scenes))
    assert torch.equal(motion, scenes.motion)
    assert (
        confidence.min() > 0.8
    )  # a bounce between two of the curves tried is off by up to 2 px: 1 / (1 + (2 / 4)^2)


def test_erratic_trajectories_are_unclear() -> None:
    generator = torch.Generator().manual_seed(0)
    centre = 64 + 20 * torch.randn(50, 33, 2, generator=generator)
    _, confidence = classify(centre, torch.full((50, 33), 50.0))
    assert confidence.max() < 0.5


def test_clips_of_another_shape_are_refused(oracle: Oracle) -> None:
    with pytest.raises(UserError, match="got \\(1, 3, 17, 128, 128\\)"):
        oracle.read(torch.zeros(1, 3, 17, 128, 128))
