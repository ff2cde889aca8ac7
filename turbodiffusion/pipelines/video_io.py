"""Files of frames: H.264 and PNG out, pictures and videos in.  A file appears whole or not at all."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from turbodiffusion.checkpoints.files import appearing
from turbodiffusion.errors import UserError

_BT709 = 1  # H.273 code of primaries and transfer
# the default one saves 5 % of the bytes for twice the time, which is longer than a video's denoising
_PRESET = "veryfast"
# however many cores there are: x264 writes other bytes with another number
_THREADS = 16
# with its tree of macroblocks x264 writes other bytes each time, at sizes like 832x480 and 96x96
_X264 = "mbtree=0"

Take = Callable[[Tensor], None]


def to_uint8(frames: Tensor) -> Tensor:
    """Frames (3, F, H, W) in [-1, 1] -> pixels (F, H, W, 3) uint8 in host memory, rounded half up."""
    return _fetch(frames)()


def write_video(path: Path, pixels: Tensor, *, fps: float, crf: int) -> None:
    """Pixels (F, H, W, 3) uint8 -> an mp4: H.264, yuv420p, BT.709, playable while it downloads."""
    with growing_video(path, fps=fps, crf=crf) as append:
        append(pixels)


@contextmanager
def growing_video(path: Path, *, fps: float, crf: int) -> Iterator[Take]:
    """The same, of pixels that come piece by piece; the file is there when the block ends."""
    playable = {"movflags": "+faststart"}
    options = {"crf": str(crf), "preset": _PRESET, "x264-params": _X264}
    with appearing(path) as part, av.open(str(part), "w", format="mp4", options=playable) as file:
        rate = Fraction(fps).limit_denominator(1001)
        stream = file.add_stream("libx264", rate=rate, options=options)
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.thread_count = _THREADS
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries = codec.color_trc = _BT709
        reformatter = VideoReformatter()  # as in decoder

        def append(pixels: Tensor) -> None:
            if not codec.is_open:
                stream.height, stream.width = pixels.shape[1:3]
            for picture in pixels.numpy():
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame = reformatter.reformat(
                    frame,
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                )
                file.mux(stream.encode(frame))

        yield append
        file.mux(stream.encode())


@contextmanager
def beside(append: Take) -> Iterator[Take]:
    """Appends frames (3, F, H, W) in [-1, 1], from any device, while the caller goes on; the end waits."""
    with ThreadPoolExecutor(1) as thread:
        jobs: list[Future[None]] = []

        def take(frames: Tensor) -> None:
            fetched = _fetch(frames)
            jobs.append(thread.submit(lambda: append(fetched())))

        yield take
        for job in jobs:
            job.result()


def _fetch(frames: Tensor) -> Callable[[], Tensor]:
    """Begin what to_uint8 does -> what waits for it."""
    unit = (1 + frames.detach().float().clamp(-1, 1)) / 2
    pixels = (255 * unit + 0.5).to(torch.uint8).permute(1, 2, 3, 0).contiguous()
    if not pixels.is_cuda:
        return pixels.cpu
    # queued behind what makes the frames, and before whatever the caller queues next
    host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True).copy_(pixels, non_blocking=True)
    copied = torch.cuda.current_stream(pixels.device).record_event()

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait


def decoder() -> Callable[[av.VideoFrame], Tensor]:
    """What makes pixels (H, W, 3) uint8 of each frame of a file."""
    reformatter = VideoReformatter()  # a frame's own prepares itself anew: five times the work

    def decoded(frame: av.VideoFrame) -> Tensor:
        rgb = reformatter.reformat(frame, format="rgb24", src_colorspace=frame.colorspace)
        return torch.from_numpy(rgb.to_ndarray())

    return decoded


def read_video(path: Path) -> tuple[Tensor, float]:
    """A video file -> pixels (F, H, W, 3) uint8 and its frames per second."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frames = [*map(decoder(), file.decode(stream))]
        return torch.stack(frames), float(stream.average_rate)


def write_picture(path: Path, pixels: Tensor) -> None:
    """Pixels (1, H, W, 3) uint8 -> a PNG."""
    with appearing(path) as part:
        Image.fromarray(pixels[0].numpy()).save(part, format="PNG")


def read_picture(path: Path) -> Tensor:
    """A picture file, upright, -> pixels (3, H, W) uint8.  UserError if it is missing or no picture."""
    if not path.is_file():
        raise UserError(f"the image {path} does not exist.")
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} can not be read as an image: {error}.") from error
    flat = torch.frombuffer(bytearray(upright.tobytes()), dtype=torch.uint8)
    return flat.view(upright.height, upright.width, 3).permute(2, 0, 1)
