"""Keep the videos that are static enough for the leaderboard's temporal flickering.

    python -m evaluation.static videos=DIR out=DIR [weights=DIR] [device=cuda]

DIR holds many samples a prompt, 25 on the leaderboard; out gets the first five of each that RAFT finds
static, as `{prompt}-0.mp4` and so on, for `python -m evaluation videos=OUT dims=[temporal_flickering]`.
Prompts that have five are left as they are; torchrun shares the others out over GPUs.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING
from rich.console import Console

from evaluation.backbones.raft import Raft, load_raft
from evaluation.backbones.weights import find_weights
from evaluation.command import run
from evaluation.metrics.motion import is_static
from evaluation.prompts import SAMPLES, file_name
from evaluation.videos import Video, find_videos, load
from turbodiffusion.checkpoints.files import appearing
from turbodiffusion.errors import UserError
from turbodiffusion.parallel import own_device, started


@dataclass
class Options:
    """The command line."""

    videos: str = MISSING
    out: str = MISSING
    weights: str | None = None
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def keep(options: Options) -> None:
    """Copy what is static; say how many of each prompt were, where that is too few."""
    file = find_weights({"the static filter": ["raft"]}, options.weights)["raft"]
    by_prompt: dict[str, list[Video]] = {}
    for video in find_videos(Path(options.videos).expanduser()).videos:
        by_prompt.setdefault(video.prompt.name, []).append(video)
    (rank, world), console = started(), Console()
    device = own_device(torch.device(options.device))
    network, out = load_raft(file, device), Path(options.out).expanduser()
    for prompt in list(by_prompt)[rank::world]:
        kept = _keep(by_prompt[prompt], network, out, device, console)
        if kept < SAMPLES:
            console.print(f"{prompt}: {kept} of {len(by_prompt[prompt])} are static", markup=False)


@torch.no_grad()
def _keep(videos: list[Video], network: Raft, out: Path, device: torch.device, console: Console) -> int:
    """How many of a prompt's videos there are in `out` now."""
    first, kept = videos[0], 0
    places = [out / (Path(file_name(first.prompt.name, i)).stem + first.path.suffix) for i in range(SAMPLES)]
    if all(place.exists() for place in places):
        return SAMPLES
    for video in videos:
        try:
            static = is_static(network, load(video, device).pixels)
        except UserError as error:
            console.print(f"{video.name} {error}", markup=False)
            continue
        if static:
            with appearing(places[kept]) as part:
                shutil.copyfile(video.path, part)
            if (kept := kept + 1) == SAMPLES:
                break
    return kept


if __name__ == "__main__":
    run(Options, keep)
