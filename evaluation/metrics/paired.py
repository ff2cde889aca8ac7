"""How far a video is from a reference of the same prompt and seed, frame by frame.

A distance along one sampling trajectory: of a kernel, a quantiser or a cache.  A distilled student's
trajectory is another, and its distance is drift, not quality.
"""

import torch
from torch import Tensor

from evaluation.backbones.lpips import LEAST, load_lpips
from evaluation.backbones.pixels import planes
from evaluation.metrics.score import VideoMetric
from evaluation.records import Score
from evaluation.videos import Footage
from turbodiffusion.errors import UserError

MOST = 100.0  # dB, of identical frames, whose PSNR is infinite
_WINDOW = 11


class PSNR(VideoMetric):
    """Peak signal-to-noise ratio of RGB in dB, the mean over frames, each at most 100."""

    name = "psnr"
    needs_reference = True

    def score(self, footage: Footage) -> Score:
        pairs = zip(footage.pixels, footage.reference, strict=True)
        errors = torch.stack([(a.int() - b.int()).square().sum(dtype=torch.int64) for a, b in pairs])
        mean_square = errors.double() / (footage.pixels[0].numel() * 255**2)
        decibels = (-10 * mean_square.log10()).clamp(max=MOST)
        return Score(float(decibels.mean()), extras={"identical_frames": int((errors == 0).sum())})


class SSIM(VideoMetric):
    """Structural similarity of RGB (DOI 10.1109/TIP.2003.819861), the mean over frames.

    A Gaussian window of 11 x 11 pixels and deviation 1.5, where it lies wholly inside; fp64,
    as variances are small differences of squares.
    """

    name = "ssim"
    needs_reference = True

    def score(self, footage: Footage) -> Score:
        pairs = zip(footage.pixels, footage.reference, strict=True)
        return Score(float(torch.stack([_ssim(a, b) for a, b in pairs]).mean()))


class LPIPS(VideoMetric):
    """Perceptual distance on AlexNet, the mean over frames; 0 is alike."""

    name = "lpips"
    needs_reference = True
    higher_is_better = False
    weights = ("lpips_alex",)

    def score(self, footage: Footage) -> Score:
        height, width = footage.pixels.shape[1:3]
        if min(height, width) < LEAST:
            raise UserError(f"is {height} x {width}, and lpips needs {LEAST} x {LEAST}")
        network = load_lpips(self.files["lpips_alex"], footage.pixels.device)
        pairs = zip(footage.pixels.split(8), footage.reference.split(8), strict=True)
        parts = [network(planes(a) / 127.5 - 1, planes(b) / 127.5 - 1) for a, b in pairs]
        return Score(float(torch.cat(parts).double().mean()))


def _ssim(one: Tensor, other: Tensor) -> Tensor:
    """Of two frames (H, W, 3) uint8."""
    height, width = one.shape[:2]
    if min(height, width) < _WINDOW:
        raise UserError(f"is {height} x {width}, less than the {_WINDOW} x {_WINDOW} window of ssim")
    x, y = (frame.movedim(-1, 0).double() / 255 for frame in (one, other))
    down, across = _window(height, x.device).T, _window(width, x.device)
    mx, my, xx, yy, xy = down @ (torch.stack((x, y, x * x, y * y, x * y)) @ across)
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
    return (likeness / ((mx * mx + my * my + c1) * (xx - mx * mx + yy - my * my + c2))).mean()


def _window(length: int, device: torch.device) -> Tensor:
    """A matrix (length, length - 10), fp64, that blurs: faster than a convolution, and never in TF32."""
    place = torch.arange(length, dtype=torch.float64, device=device)
    offset = place[:, None] - place[: length - _WINDOW + 1] - _WINDOW // 2
    weight = torch.exp(-0.5 * (offset / 1.5) ** 2) * (offset.abs() <= _WINDOW // 2)
    return weight / weight.sum(dim=0)
