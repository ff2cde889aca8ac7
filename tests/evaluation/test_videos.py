"""Which files are scored, and their frames."""

from collections.abc import Callable
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from evaluation.prompts import Prompt, Suite
from evaluation.videos import Video, decode, find_videos, load, middle
from turbodiffusion.errors import UserError


@pytest.mark.parametrize(
    ("frames", "count", "index"),
    [
        (81, 8, [4, 14, 24, 34, 44, 54, 64, 75]),
        (81, 16, [*range(2, 73, 5), 77]),
        (16, 8, [*range(0, 15, 2)]),
        (5, 8, [0, 1, 2, 3, 4, 4, 4, 4]),
    ],
)
def test_middle_frames(frames: int, count: int, index: list[int]) -> None:
    assert middle(frames, count) == index


def test_frames_come_back_as_written(tmp_path: Path, write_lossless: Callable[[Path, Tensor], None]) -> None:
    pixels = torch.randint(256, (3, 16, 32, 3)).byte()
    write_lossless(tmp_path / "a.mp4", pixels)
    read, fps = decode(tmp_path / "a.mp4")
    assert torch.equal(read, pixels)
    assert fps == 16


def test_a_folder_without_prompts(folder: Path) -> None:
    (folder / "a cat-0.json").write_text("the record beside a video")
    (folder / ".DS_Store").write_text("")
    (folder / "deeper").mkdir()
    found = find_videos(folder)
    assert [video.prompt.text for video in found.videos] == ["3-2 on the board"] * 2 + ["a cat"] * 2 + [
        "a dog"
    ] * 2
    assert list(found.odd) == [".DS_Store"]
    assert found.missing == []


def test_a_folder_with_prompts(folder: Path) -> None:
    prompts = tuple(Prompt(name, name) for name in ("a cat", "a dog-1", "a bird"))
    found = find_videos(folder, Suite(prompts, sha256=""))
    # a name that ends in a number is a prompt's before it is a sample's
    assert {video.name: video.prompt.name for video in found.videos} == {
        **{"a cat-0.mp4": "a cat", "a cat-1.mp4": "a cat", "a dog-1.mp4": "a dog-1"}
    }
    assert set(found.odd) == {"3-2 on the board-0.mp4", "3-2 on the board-1.mp4", "a dog-0.mp4"}
    assert "belongs to no prompt" in found.odd["a dog-0.mp4"]
    assert found.missing == ["a bird-0.mp4"]


def test_a_suite_wants_so_many_samples(folder: Path) -> None:
    (folder / "a cat.mp4").touch()
    found = find_videos(folder, Suite((Prompt("a cat", "a cat"),), sha256="", samples=1))
    assert [video.name for video in found.videos] == ["a cat-0.mp4"]
    assert {"a cat-1.mp4", "a cat.mp4"} <= set(found.odd)
    assert "is not one of a prompt's 1 samples" in found.odd["a cat-1.mp4"]
    found = find_videos(folder, Suite((Prompt("a cat", "a cat"),), sha256="", samples=4))
    assert found.missing == ["a cat-2.mp4", "a cat-3.mp4"]


def test_folders_without_videos_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    with pytest.raises(UserError, match=r"holds no video to score; a\.txt is no video"):
        find_videos(tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_videos(folder, reference=tmp_path / "nowhere")


def test_references(folder: Path, tmp_path: Path, write_lossless: Callable[[Path, Tensor], None]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    pixels = torch.randint(256, (4, 16, 32, 3)).byte()
    write_lossless(other / "a cat-0.mp4", pixels)
    write_lossless(other / "a cat-1.mp4", pixels[1:])
    read = {v.name: load(v, torch.device("cpu")) for v in find_videos(folder, reference=other).videos}
    assert torch.equal(read["a cat-0.mp4"].reference, pixels)
    with pytest.raises(UserError, match=r"is \(4, 16, 32, 3\) but its reference \(3, 16, 32, 3\)"):
        _ = read["a cat-1.mp4"].reference
    with pytest.raises(UserError, match="has no reference"):
        _ = read["a dog-0.mp4"].reference


@pytest.mark.parametrize("content", [b"", b"no video at all", None])
def test_what_can_not_be_decoded_says_so(folder: Path, content: bytes | None) -> None:
    path = folder / "a cat-0.mp4"
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(UserError, match="can not be read as a video"):
        load(Video(path, Prompt("a cat", "a cat")), torch.device("cpu"))


def test_what_memory_can_not_hold_is_refused_unread(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.avi"), "w") as file:
        stream = file.add_stream("mjpeg", rate=16)
        stream.height, stream.width, stream.pix_fmt = 512, 512, "yuvj420p"
        file.mux(stream.encode(av.VideoFrame(512, 512, "yuvj420p")))
    assert decode(tmp_path / "a.avi")[0].shape == (1, 512, 512, 3)
    content = bytearray((tmp_path / "a.avi").read_bytes())
    # the number of frames in the header of the stream
    place = content.index(b"strh") + 40
    assert content[place : place + 4] == (1).to_bytes(4, "little")
    content[place : place + 4] = (10_000_000).to_bytes(4, "little")
    (tmp_path / "b.avi").write_bytes(content)
    with pytest.raises(UserError, match=r"is too large: 14648\.4 GiB for its frames"):
        decode(tmp_path / "b.avi")
