"""Fréchet video distance (arXiv:1812.01717) between two folders of videos.

    python -m evaluation.fvd videos=DIR reference=DIR [out=FILE.json] [frames=16] [weights=DIR] [device=cuda]

Compares I3D's logits of every video's first frames, made 224 x 224 without smoothing; covariances divide by
N - 1.  It is biased upwards, more the fewer videos: only distances of equal numbers compare, and the distance
between two sets of the reference's own kind, of other seeds, is what 0 would be.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from omegaconf import MISSING
from rich.console import Console
from rich.progress import track
from torch import Tensor

from evaluation.backbones.i3d import LEAST, for_i3d, load_i3d
from evaluation.backbones.weights import find_weights
from evaluation.command import run
from evaluation.distribution import frechet_distance
from evaluation.videos import find_videos, load
from turbodiffusion.checkpoints.saving import write_json
from turbodiffusion.errors import UserError

FEW = 256  # videos: below, the number says little


@dataclass
class Options:
    """The command line."""

    videos: str = MISSING
    reference: str = MISSING
    out: str | None = None
    frames: int = 16
    weights: str | None = None
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
def features(folder: Path, weights: Path, frames: int, device: torch.device) -> Tensor:
    """Logits (videos, 400) of the first frames of each; UserError names a video that has fewer."""
    network, found = load_i3d(weights, device), []
    for video in track(find_videos(folder).videos, folder.name, console=Console(stderr=True)):
        pixels = load(video, device).pixels[:frames]
        if len(pixels) < frames:
            raise UserError(f"{video.path} has {len(pixels)} frames; frames={frames} were asked for")
        found.append(network(for_i3d(pixels))[0])
    return torch.stack(found)


def measure(options: Options) -> dict[str, object]:
    """The distance, and of what."""
    if options.frames < LEAST:
        raise UserError(f"frames={options.frames}: I3D needs {LEAST}")
    weights = find_weights({"fvd": ["i3d"]}, options.weights)["i3d"]
    device = torch.device(options.device)
    folders = (Path(each).expanduser() for each in (options.videos, options.reference))
    sets = [features(folder, weights, options.frames, device) for folder in folders]
    distance = frechet_distance(*sets, may_be_singular=True)
    return {"fvd": distance, "counts": [*map(len, sets)], "options": asdict(options)}


def report(options: Options) -> None:
    """Write and print it."""
    result = measure(options)
    if options.out is not None:
        write_json(Path(options.out).expanduser(), result)
    few = f"; of fewer than {FEW} it says little" if min(result["counts"]) < FEW else ""
    said = "FVD {:.2f}, {} videos to {}".format(result["fvd"], *result["counts"])
    Console().print(said + few, highlight=False)


if __name__ == "__main__":
    run(Options, report)
