"""Dimensions by name.  A new one is a VideoMetric in a file of its own, and a line here."""

from pathlib import Path

from evaluation.backbones.weights import find_weights
from evaluation.metrics.action import HumanAction
from evaluation.metrics.consistency import BackgroundConsistency, SubjectConsistency
from evaluation.metrics.flickering import TemporalFlickering
from evaluation.metrics.motion import DynamicDegree, MotionSmoothness
from evaluation.metrics.paired import LPIPS, PSNR, SSIM
from evaluation.metrics.quality import AestheticQuality, ImagingQuality
from evaluation.metrics.score import VideoMetric
from evaluation.metrics.small_world import SmallWorld
from evaluation.metrics.text import AppearanceStyle, ClipSim, ClipTemp, OverallConsistency, TemporalStyle
from evaluation.vbench import DIMENSIONS
from turbodiffusion.errors import UserError

_ALL = (
    *(SubjectConsistency, BackgroundConsistency, TemporalFlickering, MotionSmoothness, DynamicDegree),
    *(AestheticQuality, ImagingQuality, HumanAction, AppearanceStyle, TemporalStyle, OverallConsistency),
    *(ClipSim, ClipTemp, PSNR, SSIM, LPIPS, SmallWorld),
)
METRICS: dict[str, type[VideoMetric]] = {each.name: each for each in _ALL}


def make_metrics(names: list[str], weights: Path | None = None) -> dict[str, VideoMetric]:
    """Metrics by name, in order, with weights from a folder or the usual places.

    UserError names all that there are not, and all weights that are missing.
    """
    if unknown := [name for name in names if name not in METRICS]:
        later = " (a dimension of VBench, but not scored here)"
        told = ", ".join(name + later * (name in DIMENSIONS) for name in unknown)
        raise UserError(f"there is no metric {told}; choose from {', '.join(METRICS)}")
    if not names:
        raise UserError(f"dims=[] scores nothing; choose from {', '.join(METRICS)}")
    files = find_weights({name: METRICS[name].weights for name in names}, weights)
    return {name: METRICS[name](files) for name in names}


__all__ = ["METRICS", "VideoMetric", "make_metrics"]
