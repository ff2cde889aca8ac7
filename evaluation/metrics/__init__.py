"""Dimensions by name.  A new one is a VideoMetric in a file of its own, and a line here."""

from evaluation.metrics.flickering import TemporalFlickering
from evaluation.metrics.paired import PSNR, SSIM
from evaluation.metrics.score import VideoMetric
from evaluation.metrics.small_world import SmallWorld
from evaluation.vbench import DIMENSIONS
from turbodiffusion.errors import UserError

METRICS: dict[str, type[VideoMetric]] = {
    each.name: each for each in (TemporalFlickering, PSNR, SSIM, SmallWorld)
}


def make_metrics(names: list[str]) -> dict[str, VideoMetric]:
    """Metrics by name, in order; UserError names all that there are not."""
    if unknown := [name for name in names if name not in METRICS]:
        later = " (a dimension of VBench, but not scored here)"
        told = ", ".join(name + later * (name in DIMENSIONS) for name in unknown)
        raise UserError(f"there is no metric {told}; choose from {', '.join(METRICS)}")
    if not names:
        raise UserError(f"dims=[] scores nothing; choose from {', '.join(METRICS)}")
    return {name: METRICS[name]() for name in names}


__all__ = ["METRICS", "VideoMetric", "make_metrics"]
