import errno
import json
from pathlib import Path

import av
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from turbodiffusion.checkpoints.saving import write_json
from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.video_io import (
    beside,
    growing_video,
    read_picture,
    read_video,
    to_uint8,
    write_picture,
    write_video,
)


def moving_squares(frames: int = 9, height: int = 64, width: int = 96) -> Tensor:
    """Saturated colours that move: what a wrong colour matrix or a lost frame would show on."""
    pixels = torch.zeros(frames, height, width, 3, dtype=torch.uint8)
    for f in range(frames):
        pixels[f, :, :, 2] = 90
        pixels[f, 8:40, 4 * f : 4 * f + 32] = torch.tensor([230, 20, 40], dtype=torch.uint8)
        pixels[f, 40:64, 64:96] = torch.tensor([10, 200, 30], dtype=torch.uint8)
    return pixels


def psnr(a: Tensor, b: Tensor) -> float:
    return (10 * torch.log10(255**2 / (a.double() - b.double()).square().mean())).item()


@pytest.mark.parametrize("fps", [8, 16, 23.976])
def test_a_video_reads_back_with_its_frames_rate_size_and_colours(tmp_path: Path, fps: float) -> None:
    pixels = moving_squares()
    write_video(tmp_path / "a.mp4", pixels, fps=fps, crf=10)
    read, rate = read_video(tmp_path / "a.mp4")
    assert read.shape == pixels.shape
    assert rate == pytest.approx(fps, rel=1e-4)  # 23.976 is kept as 24000/1001
    # chroma is halved: edges cost most; a wrong colour matrix would bring this below 25 dB
    assert psnr(read, pixels) > 30
    inside = (slice(None), slice(44, 60), slice(70, 90))
    # flat colour away from edges: 8-bit yuv and crf 10 leave a few steps
    assert (read[inside].int() - pixels[inside].int()).abs().max() <= 6


def test_a_file_follows_from_its_pixels_alone(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 3, 3, 16, 16, generator=generator)
    smooth = F.interpolate(coarse, size=(9, 96, 96), mode="trilinear")[0].permute(1, 2, 3, 0)
    grain = torch.randn(smooth.shape, generator=generator)
    pixels = (60 * smooth + 5 * grain + 128).clamp(0, 255).to(torch.uint8)
    written = set()
    for _ in range(30):  # by x264's own settings as many are of three kinds and more
        write_video(tmp_path / "clip.mp4", pixels, fps=8, crf=18)
        written.add((tmp_path / "clip.mp4").read_bytes())
    assert len(written) == 1


def test_a_lower_crf_keeps_more(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (5, 64, 64, 1), dtype=torch.uint8).expand(-1, -1, -1, 3).contiguous()
    for crf in (5, 40):
        write_video(tmp_path / f"{crf}.mp4", noise, fps=8, crf=crf)
    fine, coarse = (psnr(read_video(tmp_path / f"{crf}.mp4")[0], noise) for crf in (5, 40))
    assert fine > coarse + 5


def test_a_video_written_beside_its_making_has_all_its_frames_in_order(tmp_path: Path) -> None:
    pixels = moving_squares()
    frames = pixels.permute(3, 0, 1, 2) / 127.5 - 1
    assert torch.equal(to_uint8(frames), pixels)
    with growing_video(tmp_path / "a.mp4", fps=8, crf=10) as append, beside(append) as take:
        for piece in frames.split((1, 4, 4), dim=1):
            take(piece)
    read, _ = read_video(tmp_path / "a.mp4")
    assert read.shape == pixels.shape
    # as when written at once; the frame before or after, 4 pixels off, is below 20 dB
    assert all(psnr(one, other) > 30 for one, other in zip(read, pixels, strict=True))


def test_what_fails_beside_is_raised_and_leaves_nothing(tmp_path: Path) -> None:
    def full(pixels: Tensor) -> None:
        raise UserError("no space left")

    with pytest.raises(UserError, match="no space left"), beside(full) as take:
        take(torch.zeros(3, 1, 64, 96))

    def fail() -> None:
        with growing_video(tmp_path / "a.mp4", fps=8, crf=18) as append, beside(append) as take:
            take(torch.zeros(3, 1, 64, 96))
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_plain_h264_that_says_its_colours(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", moving_squares(), fps=8, crf=18)
    with av.open(str(tmp_path / "a.mp4")) as file:
        codec = file.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (codec.colorspace, codec.color_primaries, codec.color_trc) == (1, 1, 1)  # BT.709
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # plays before it is all there


def test_rounding_is_half_up_and_clamps() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0, 1 / 255])
    frames = values.view(1, 1, 1, -1).expand(3, 1, 1, -1)
    # 255 (1 + x) / 2: 0 -> 127.5 -> 128; 1/255 -> 128.0
    assert to_uint8(frames)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 128]


def test_a_picture_reads_back_exactly(tmp_path: Path) -> None:
    pixels = moving_squares(1)
    write_picture(tmp_path / "a.png", pixels)
    assert torch.equal(read_picture(tmp_path / "a.png"), pixels[0].permute(2, 0, 1))


def test_a_turned_photograph_is_read_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # turned a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").shape == (3, 20, 10)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n broken"])
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match="can not be read as an image"):
        read_picture(tmp_path / "a.png")


def test_half_a_picture_is_refused(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="can not be read as an image"):
        read_picture(tmp_path / "a.png")


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.png does not exist"):
        read_picture(tmp_path / "nowhere.png")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4", moving_squares(), fps=8, crf=18)
    before = (tmp_path / "a.mp4").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)  # what a full disk says at the last moment
    with pytest.raises(UserError, match="No space left"):
        write_video(tmp_path / "a.mp4", moving_squares(5), fps=8, crf=18)
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    class Interrupting(list):
        def numpy(self) -> "Interrupting":
            return self

        shape = (3, 64, 96, 3)

        def __iter__(self):
            yield moving_squares(1)[0].numpy()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "a.mp4", Interrupting(), fps=8, crf=18)
    assert list(tmp_path.iterdir()) == []


def test_json_is_readable_text(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"prompt": '猫 \n "quoted"'})
    assert "猫" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "a.json").read_text())["prompt"] == '猫 \n "quoted"'
