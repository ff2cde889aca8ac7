import pytest
import torch
from torch import Tensor

from turbodiffusion.small_world.clips import (
    Scenes,
    area_weights,
    background_rows,
    draw_scenes,
    render,
    trajectories,
)
from turbodiffusion.small_world.split import COLORS, MOTIONS
from turbodiffusion.small_world.sprites import Sprites, load_sprites


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    return load_sprites()


def _scenes(count: int, seed: int = 0) -> Scenes:
    return draw_scenes(count, torch.Generator().manual_seed(seed))


def _moments(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centroid x, y and area (B, F) of what differs from the colour of the pixel row's left end, in px."""
    mask = ((frames - frames[..., :1]).abs().amax(dim=1) > 0.1).float()
    area, axis = mask.sum(dim=(2, 3)), torch.arange(128.0)
    return (mask.sum(dim=2) * axis).sum(-1) / area, (mask.sum(dim=3) * axis).sum(-1) / area, area


def _moved(motion: str, sprites: Sprites) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of six steady, well visible sprites that make this motion over a green background."""
    scenes = _scenes(6)
    scenes.subject = torch.tensor(
        [sprites.names.index(n) for n in ("cow", "bus", "panda", "taxi", "owl", "zebra")]
    )
    scenes.motion[:] = MOTIONS.index(motion)
    scenes.background[:] = COLORS.index("green")
    return _moments(render(scenes, sprites))


def test_same_seed_same_clips(sprites: Sprites) -> None:
    first, second = (render(_scenes(2, seed=3), sprites) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, render(_scenes(2, seed=4), sprites))


def test_a_batch_equals_its_clips_one_by_one(sprites: Sprites) -> None:
    scenes = _scenes(4)
    singles = torch.cat([render(scenes[i : i + 1], sprites) for i in range(4)])
    torch.testing.assert_close(render(scenes, sprites), singles, rtol=0, atol=1e-5)  # order of fp32 sums


def test_frames_have_the_promised_shape_and_range(sprites: Sprites) -> None:
    frames = render(_scenes(2), sprites)
    assert frames.shape == (2, 3, 33, 128, 128)
    assert frames.dtype == torch.float32
    assert frames.is_contiguous()
    assert frames.min() >= -1 - 1e-5  # sums of 96 fp32 weights
    assert frames.max() <= 1 + 1e-5


@pytest.mark.parametrize("motion", ["left", "right", "up", "down"])
def test_travel_moves_the_centroid_one_way(motion: str, sprites: Sprites) -> None:
    x, y, area = _moved(motion, sprites)
    along, across = (x, y) if motion in ("left", "right") else (y, x)
    way = 1 if motion in ("right", "down") else -1
    # 40 to 60 px, less or more what the sprite's animation does: at most 7 px
    assert ((way * (along[:, -1] - along[:, 0]) - 50).abs() < 17).all()
    assert (across.amax(1) - across.amin(1) < 8).all()
    assert (area.amax(1) / area.amin(1) < 1.5).all()


@pytest.mark.parametrize(("motion", "way"), [("grow", 1), ("shrink", -1)])
def test_growth_changes_the_area_and_not_the_place(motion: str, way: int, sprites: Sprites) -> None:
    x, y, area = _moved(motion, sprites)
    ratio = (area[:, -1] / area[:, 0]) ** (way / 2)
    # 1.82 to 2.25 fold in size, a few per cent for the animation
    assert (ratio > 1.7).all()
    assert (ratio < 2.4).all()
    assert (x.amax(1) - x.amin(1) < 10).all()
    assert (y.amax(1) - y.amin(1) < 10).all()


def test_still_stays(sprites: Sprites) -> None:
    x, y, _ = _moved("still", sprites)
    assert max(float((c.amax(1) - c.amin(1)).max()) for c in (x, y)) < 8  # the animation alone


def test_circle_goes_around_once_and_returns(sprites: Sprites) -> None:
    x, y, _ = _moved("circle", sprites)
    for c in (x, y):
        assert ((c.amax(1) - c.amin(1) - 40).abs() < 16).all()  # diameters of 32 to 48 px, animation 8 px
        assert ((c[:, -1] - c[:, 0]).abs() < 8).all()


def test_bounce_goes_up_and_down_several_times_in_place(sprites: Sprites) -> None:
    x, y, _ = _moved("bounce", sprites)
    assert (x.amax(1) - x.amin(1) < 8).all()
    assert (y.amax(1) - y.amin(1) > 20).all()
    is_high = y < (y.amax(1, keepdim=True) + y.amin(1, keepdim=True)) / 2
    assert (is_high.int().diff(dim=1).abs().sum(dim=1) >= 3).all()


def test_everything_stays_inside_the_frame() -> None:
    centre, size = trajectories(_scenes(2000))
    assert (centre - size[..., None] / 2).min() >= 0
    assert (centre + size[..., None] / 2).max() <= 128


def test_backgrounds_are_far_apart_and_gradients_run_from_light_to_dark() -> None:
    rows = background_rows(torch.arange(16), torch.zeros(16, 3))
    distance = (rows[:, None] - rows).abs().mean(dim=(2, 3)) + torch.eye(16)
    assert distance.min() > 2 * 0.03  # no tint makes one background another
    brightness = rows.mean(dim=1)
    assert (brightness[:8].diff(dim=1) == 0).all()
    assert (brightness[8:].diff(dim=1) < 0).all()


def test_resampling_keeps_area_and_centre() -> None:
    centre, size = torch.tensor([40.3, 70.0, 64.5]), torch.tensor([44.0, 63.7, 96.0])
    step = 96 / size
    weights = area_weights(48 - centre * step, step, 128, 96)
    image = torch.ones(3, 1, 96, 1)
    shrunk = (weights[:, None] @ image)[:, 0, :, 0]
    # a box 96 texels wide becomes one of `size` px: its integral is exact in exact arithmetic; fp32 here
    torch.testing.assert_close(shrunk.sum(dim=1), size, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        (shrunk * (torch.arange(128) + 0.5)).sum(dim=1) / size, centre, rtol=1e-5, atol=0
    )
    assert shrunk.max() <= 1 + 1e-6


def test_scenes_can_be_sliced_and_picked() -> None:
    scenes = _scenes(6)
    assert len(scenes[2:5]) == 3
    picked = scenes[torch.tensor([4, 1])]
    assert picked.subject.tolist() == [int(scenes.subject[4]), int(scenes.subject[1])]
    assert torch.equal(picked.place, scenes.place[[4, 1]])
