from pathlib import Path

import pytest

from turbodiffusion.checkpoints import locate
from turbodiffusion.errors import UserError

FILE = "Wan2.1_VAE.pth"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every folder that is searched, in order; assets/ is the repository's and stays out of it."""
    here = tmp_path / "here"
    found = [tmp_path / "models" / "expert", tmp_path / "models", tmp_path / "stated", here / "weights"]
    for folder in found:
        folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("TURBODIFFUSION_WEIGHTS", str(found[2]))
    monkeypatch.chdir(here)
    return found


def test_the_nearest_place_wins(places: list[Path]) -> None:
    ckpt = places[0] / "model.safetensors"
    for folder in reversed(places):
        (folder / FILE).touch()
        assert locate("vae", "wan2.1", ckpt).resolve() == folder / FILE
    assert locate("vae", "wan2.1", places[0]).resolve() == places[0] / FILE


def test_diffusers_folders_are_found_beside_the_transformer(places: list[Path]) -> None:
    for part in ("transformer", "vae", "text_encoder", "tokenizer", "image_encoder"):
        (places[1] / part).mkdir()
    for kind, name in (("vae", "wan2.2"), ("text_encoder", "umt5_xxl"), ("tokenizer", "umt5_xxl")):
        assert locate(kind, name, places[1] / "transformer") == places[1] / kind
    assert locate("image_encoder", "clip_vit_h", places[1]) == places[1] / "image_encoder"


def test_a_given_path_goes_before_all_and_must_exist(places: list[Path]) -> None:
    (places[0] / FILE).touch()
    (places[2] / "mine.pth").touch()
    assert locate("vae", "wan2.1", places[0], given=places[2] / "mine.pth") == places[2] / "mine.pth"
    with pytest.raises(UserError, match=r"vae none\.pth does not exist"):
        locate("vae", "wan2.1", places[0], given="none.pth")


def test_what_is_nowhere_is_named_with_places_and_source(places: list[Path]) -> None:
    with pytest.raises(UserError) as refused:
        locate("text_encoder", "umt5_xxl", places[0])
    said = str(refused.value)
    assert "models_t5_umt5-xxl-enc-bf16.pth" in said
    assert "huggingface.co/Wan-AI" in said
    assert all(str(folder) in said for folder in places[:3])
    assert "text_encoder=" in said
