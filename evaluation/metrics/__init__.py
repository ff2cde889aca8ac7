"""Dimensions by name.  A new one is a VideoMetric in a file of its own, and a line here."""

from evaluation.backbones.weights import find_weights
from evaluation.metrics.action import HumanAction
from evaluation.metrics.consistency import BackgroundConsistency, SubjectConsistency
from evaluation.metrics.motion import DynamicDegree, MotionSmoothness, TemporalFlickering
from evaluation.metrics.paired import LPIPS, PSNR, SSIM
from evaluation.metrics.quality import AestheticQuality, ImagingQuality
from evaluation.metrics.score import VideoMetric
from evaluation.metrics.small_world import SmallWorld
from evaluation.metrics.text import AppearanceStyle, ClipSim, ClipTemp, OverallConsistency, TemporalStyle
from evaluation.metrics.upstream import DETECTED, HOW, Detected, Upstream
from evaluation.vbench import DIMENSIONS
from turbodiffusion.errors import UserError

_ALL = (
    *(SubjectConsistency, BackgroundConsistency, TemporalFlickering, MotionSmoothness, DynamicDegree),
    *(AestheticQuality, ImagingQuality, HumanAction, AppearanceStyle, TemporalStyle, OverallConsistency),
    *(ClipSim, ClipTemp, PSNR, SSIM, LPIPS, SmallWorld),
)
METRICS: dict[str, type[VideoMetric]] = {each.name: each for each in _ALL}


def make_metrics(
    names: list[str], weights: str | None = None, upstream: Upstream | None = None
) -> dict[str, VideoMetric]:
    """Metrics by name, in order, with weights from a folder or the usual places.

    UserError names all that there are not, and all weights that are missing, or what upstream is lacking.
    """
    known = [*METRICS, *DETECTED]
    if unknown := [name for name in names if name not in known]:
        later = " (a dimension of VBench, but not scored here)"
        told = ", ".join(name + later * (name in DIMENSIONS) for name in unknown)
        raise UserError(f"there is no metric {told}; choose from {', '.join(known)}")
    if not names:
        raise UserError(f"dims=[] scores nothing; choose from {', '.join(known)}")
    if detected := [name for name in names if name in DETECTED]:
        if upstream is None:
            told = " and ".join(detected)
            raise UserError(f"{told}: upstream=PYTHON must have VBench's own package: {HOW}")
        upstream.check(detected)
    needs = {name: (DETECTED[name],) if name in DETECTED else METRICS[name].weights for name in names}
    files = find_weights(needs, weights)
    return {
        name: Detected(name, files, upstream) if name in DETECTED else METRICS[name](files) for name in names
    }


__all__ = ["DETECTED", "METRICS", "Upstream", "VideoMetric", "make_metrics"]
