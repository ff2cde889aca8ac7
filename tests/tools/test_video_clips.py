"""Real videos: which pixels become a clip, and what `make_data mode=encode` makes of them."""

from collections.abc import Callable
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from distill.shard_files import TarShard
from tools import make_data
from tools.video_clips import read_clip
from turbodiffusion.checkpoints import load_vae
from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.pipelines.video_io import read_video

ASSETS = Path(__file__).resolve().parents[2] / "assets"
Run = Callable[..., tuple[int, str]]


def write_clip(path: Path, frames: Tensor, fps: int = 8) -> Path:
    """Frames (F, H, W, 3) uint8 as lossless video, by PyAV alone."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "bgr0"
        for frame in frames.numpy():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


def noise(frames: int, height: int = 32, width: int = 32) -> Tensor:
    rng = torch.Generator().manual_seed(frames)
    return torch.randint(256, (frames, height, width, 3), generator=rng, dtype=torch.uint8)


def test_a_clip_covers_the_size_from_the_middle(tmp_path: Path) -> None:
    frames = noise(3, 32, 96)
    clip = read_clip(write_clip(tmp_path / "wide.mkv", frames), 3, 8, Size(32, 32))
    middle = frames[:, :, 32:64].permute(3, 0, 1, 2).float() / 127.5 - 1
    # nothing is resized: only the last bit of fp32 may differ
    torch.testing.assert_close(clip, middle, rtol=0, atol=1e-6)
    tall = torch.zeros(1, 128, 64, 3, dtype=torch.uint8)
    tall[:, 32:96] = 255
    assert read_clip(write_clip(tmp_path / "tall.mkv", tall), 1, 8, Size(32, 32)).eq(1).all()


@pytest.mark.parametrize(
    ("rate", "fps", "wanted"), [(8, 8, [0, 1, 2]), (24, 8, [0, 3, 6]), (12, 8, [0, 2, 3])]
)
def test_frames_are_those_of_their_time(rate: int, fps: int, wanted: list[int], tmp_path: Path) -> None:
    frames = noise(7)
    clip = read_clip(write_clip(tmp_path / "a.mkv", frames, rate), 3, fps, Size(32, 32))
    torch.testing.assert_close(
        clip, frames[wanted].permute(3, 0, 1, 2).float() / 127.5 - 1, rtol=0, atol=1e-6
    )


def test_clips_too_short_too_slow_or_broken_are_named(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", noise(4))
    (tmp_path / "b.mp4").write_bytes(b"no video")
    for name, frames, fps, part in (
        ("a.mkv", 5, 8, "shorter"),
        ("a.mkv", 2, 16, "fps=8"),
        ("b.mp4", 1, 8, "read"),
    ):
        with pytest.raises(UserError, match=f"{name}.*{part}"):
            read_clip(path.with_name(name), frames, fps, Size(32, 32))


ENCODE = ("mode=encode", "device=cpu", "frames=5", "size=32x32", "fps=8")


@pytest.mark.parametrize("with_picture", [False, True])
def test_videos_are_encoded_with_their_captions(run: Run, tmp_path: Path, with_picture: bool) -> None:
    """From an mp4 by libx264: its own decoded pixels through the VAE are the oracle."""
    pixels = noise(9).float().mul(0.2).add(100).byte()
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in pixels.numpy():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    (tmp_path / "a.txt").write_text("grey noise\n")
    words = (f"videos={tmp_path}", f"dst={tmp_path / 'd'}", f"with_picture={str(with_picture).lower()}")
    assert run(make_data, *ENCODE, *words)[0] == 0
    sample = TarShard(tmp_path / "d" / "shard_000000.tar").read(0)
    decoded, _ = read_video(tmp_path / "a.mp4")
    frames = decoded[:5].permute(3, 0, 1, 2).float().unsqueeze(0) / 127.5 - 1
    vae = load_vae(ASSETS / "vae_tiny.safetensors", device="cpu", dtype=torch.float32)
    with torch.no_grad():
        wanted = vae.encode(frames, chunk=None)[0]
    # stored in bf16, which has 8 bits; fp32 sums differ far less
    torch.testing.assert_close(sample.latents.float(), wanted, rtol=2**-8, atol=1e-4)
    assert sample.prompt == "grey noise"
    mask, known = sample.condition.float().split((4, 16))
    if with_picture:
        assert mask[:, 0].eq(1).all()
        # the VAE is causal: the first frame alone has the first latent of the clip
        torch.testing.assert_close(known[:, 0], wanted[:, 0], rtol=2**-8, atol=1e-4)
    else:
        assert not known.any()
    assert not mask[:, 1:].any()


def test_a_csv_lists_videos_and_broken_ones_can_be_left_out(run: Run, tmp_path: Path) -> None:
    for name in ("one", "two", "four"):
        write_clip(tmp_path / f"{name}.mkv", noise(5))
    write_clip(tmp_path / "three.mkv", noise(2))
    rows = [f'{name}.mkv,"a clip, the {name}"' for name in ("one", "two", "three", "four")]
    (tmp_path / "list.csv").write_text("\n".join(["path,caption", *rows]))
    words = (*ENCODE, f"csv={tmp_path / 'list.csv'}", f"dst={tmp_path / 'd'}", "batch=2")
    code, said = run(make_data, *words)
    assert (code, "three.mkv is shorter" in said, "skip_broken=true" in said) == (2, True, True)
    with pytest.warns(UserWarning, match=r"left out: .*three\.mkv"):
        assert run(make_data, *words, "skip_broken=true")[0] == 0
    shard = TarShard(tmp_path / "d" / "shard_000000.tar")
    assert shard.keys == ["000000000", "000000001", "000000003"]
    assert [shard.read(i).prompt for i in range(3)] == [f"a clip, the {n}" for n in ("one", "two", "four")]
