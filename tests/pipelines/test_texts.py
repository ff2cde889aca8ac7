"""Contexts on disk are those of the encoder, to the bit, and spare it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.tokenizers import ByteTokenizer
from turbodiffusion.pipelines.command import generate
from turbodiffusion.pipelines.texts import StoredTexts, cache_folder
from turbodiffusion.pipelines.watch import Watch

WATCH = Watch(torch.device("cpu"))
SIZES = {"length": 24, "vocab": 259, "dim": 16, "ffn_dim": 8, "heads": 1, "head_dim": 8, "layers": 1}


@pytest.fixture
def encoder() -> TextEncoder:
    return TextEncoder(tokenizer=ByteTokenizer(), **SIZES).to(torch.bfloat16)


@pytest.fixture
def ask(encoder: TextEncoder, tmp_path: Path) -> Callable[..., tuple[Tensor, bool]]:
    """Asks anew, as another run would -> the context, and whether the encoder was loaded."""

    def asked(text: str, identity: str = "this encoder", folder: Path = tmp_path) -> tuple[Tensor, bool]:
        loads: list[int] = []

        def load() -> TextEncoder:
            loads.append(1)
            return encoder

        texts = StoredTexts(load, folder, identity)
        return texts.context(text, lambda encoder: encoder([text]), WATCH), bool(loads)

    return asked


@pytest.mark.parametrize("text", ["a cat", "", "longer than what fits, so that nothing is zero"])
@pytest.mark.filterwarnings("ignore:a prompt has")
def test_a_text_is_encoded_once(ask: Callable, encoder: TextEncoder, text: str) -> None:
    for loaded in (True, False):
        context, was_loaded = ask(text)
        assert was_loaded is loaded
        assert torch.equal(context, encoder([text]))
        assert context.dtype == torch.bfloat16


def test_what_the_encoder_does_not_tell_apart_is_one_text(ask: Callable) -> None:
    ask("a cat &amp; a dog")
    assert ask("  a cat & a  dog\n")[1] is False


@pytest.mark.parametrize("other", [("a dog",), ("a cat", "another encoder")])
def test_another_text_or_encoder_is_encoded(ask: Callable, other: tuple[str, ...]) -> None:
    ask("a cat")
    assert ask(*other)[1] is True


@pytest.mark.parametrize("damage", [b"", b"nonsense" * 9])
def test_a_damaged_file_is_made_again(ask: Callable, tmp_path: Path, damage: bytes) -> None:
    wanted, _ = ask("a cat")
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage)
    for loaded in (True, False):
        context, was_loaded = ask("a cat")
        assert was_loaded is loaded
        assert torch.equal(context, wanted)


def test_a_folder_that_can_not_be_written_is_only_a_warning(ask: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="text_cache=none"):
        context, _ = ask("a cat", folder=tmp_path / "file" / "folder")
    assert torch.equal(context, ask("a cat")[0])


def test_the_users_cache_is_where_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("auto") == tmp_path / "turbodiffusion" / "texts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("auto") == Path.home() / ".cache" / "turbodiffusion" / "texts"
    assert cache_folder("none") is None
    assert cache_folder("~/texts") == Path.home() / "texts"


def test_a_prompt_seen_before_makes_its_video_without_the_encoder(family: Callable, tmp_path: Path) -> None:
    options = family("wan_tiny").options(text_cache=str(tmp_path / "texts"))
    records = []
    for name, prompt in (("one", "a cat"), ("again", "a cat"), ("other", "a dog")):
        generate(replace(options, prompt=prompt, out=str(tmp_path / f"{name}.mp4")))
        records.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert ["loading" in record["seconds"] for record in records] == [True, False, True]
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()
    generate(replace(options, text_cache="none", out=str(tmp_path / "plain.mp4")))
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "plain.mp4").read_bytes()
