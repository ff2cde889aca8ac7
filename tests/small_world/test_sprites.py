import json
import shutil
from pathlib import Path

import pytest
import torch

from tools.select_sprites import Options, select
from turbodiffusion.errors import UserError
from turbodiffusion.small_world.split import HELD_OUT, SEEN
from turbodiffusion.small_world.sprites import SPRITES, Sprites, load_sprites, subject_names


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    return load_sprites()


def test_the_cast_is_complete_and_moves(sprites: Sprites) -> None:
    assert sprites.rgba.shape == (SEEN + HELD_OUT, 24, 4, 96, 96)
    assert sprites.rgba.dtype == torch.uint8
    assert len(set(sprites.names)) == SEEN + HELD_OUT
    assert sprites.held_out == (False,) * SEEN + (True,) * HELD_OUT
    alpha = sprites.rgba[:, :, 3].float() / 255
    assert alpha.mean(dim=(1, 2, 3)).min() > 0.1  # something to see
    assert (sprites.rgba.float().diff(dim=1).abs().mean(dim=(1, 2, 3, 4)) > 0).all()


def test_a_sprites_own_animation_neither_travels_nor_swells(sprites: Sprites) -> None:
    alpha = sprites.rgba[:, :, 3].float()
    area = alpha.sum(dim=(2, 3))
    axis = torch.arange(96.0)
    x, y = (alpha.sum(dim=2) * axis).sum(-1) / area, (alpha.sum(dim=3) * axis).sum(-1) / area
    # 10 of 96 px is 7 px of the largest sprite in a clip; motions travel 16 px (a circle's radius) and more
    assert max(float((c.amax(1) - c.amin(1)).max()) for c in (x, y)) < 10
    # a third in area is 15 % in size; "grow" is 80 % and more
    assert float((area.amax(1) / area.amin(1)).max()) < 1.34


def test_premultiplied_colours_vanish_where_nothing_is(sprites: Sprites) -> None:
    frame = sprites.premultiplied(torch.tensor([3]), torch.tensor([5]))
    assert frame.shape == (1, 4, 96, 96)
    colour, alpha = frame[:, :3], frame[:, 3:]
    assert (colour.abs() <= alpha + 1e-6).all()  # fp32 rounding of a product of numbers below 1
    assert colour.min() < 0 < colour.max()


def test_selecting_again_gives_the_same_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    index = json.loads((SPRITES / "index.json").read_text())
    for entry in index:
        shutil.copyfile(SPRITES / entry["file"], source / entry["file"])
    (source / "index.json").write_text(json.dumps(index))
    shutil.copyfile(SPRITES / "LICENSE", source / "LICENSE")
    select(Options(str(source), str(tmp_path / "selected")))
    for path in (tmp_path / "selected").iterdir():
        assert path.read_bytes() == (SPRITES / path.name).read_bytes()
    assert subject_names(tmp_path / "selected") == subject_names()


def test_missing_and_broken_sprites_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no sprites in .*select_sprites"):
        load_sprites(tmp_path)
    shutil.copyfile(SPRITES / "index.json", tmp_path / "index.json")
    (tmp_path / "octopus.webp").write_bytes(b"RIFF")
    with pytest.raises(UserError, match=r"octopus.webp is no sprite of 24 frames"):
        load_sprites(tmp_path)
    with pytest.raises(UserError, match=r"holds no index.json"):
        select(Options(str(tmp_path / "nowhere"), str(tmp_path / "selected")))


def test_the_folder_stays_small_and_carries_its_licence() -> None:
    assert sum(path.stat().st_size for path in SPRITES.iterdir()) < 3 * 2**20
    assert "Microsoft" in (SPRITES / "LICENSE").read_text()
