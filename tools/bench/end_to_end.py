"""Time of every stage and peak memory of a whole generation at real size, random weights.

    python -m tools.bench.end_to_end variant=wan2.1_t2v_1.3b size=832x480 steps=50
    python -m tools.bench.end_to_end variant=wan2.1_t2v_14b size=1280x720 steps=2 offload=block

Included: text encoder, denoising with classifier-free guidance, VAE decoding, moving weights.
Excluded: making the weights, writing the file.  A short warm-up run comes first.
"""

import sys
from dataclasses import dataclass, replace

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from tools.bench.forward import random_network, randomize
from tools.options import parse
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.tokenizers import ByteTokenizer
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.pipelines.generate import Clip, Models, Pipeline
from turbodiffusion.pipelines.offload import check_offload
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.variants import CONFIGS, Variant, variant

PROMPT = "an octopus drifts left across a teal background, " * 4


@dataclass
class Options:
    """The command line."""

    variant: str = "wan2.1_t2v_1.3b"
    size: str = "832x480"
    frames: int = 81
    steps: int = 50
    offload: str = "none"
    device: str = "cuda"


def random_models(row: Variant, device: torch.device, home: torch.device) -> Models:
    """The variant's network, VAE and umT5-xxl in bf16, random weights made on the device."""
    sizes = yaml.safe_load((CONFIGS / "vae" / f"{row.vae}.yaml").read_text())
    sizes.pop("_target_")
    with torch.device("meta"):
        text_encoder = TextEncoder(tokenizer=ByteTokenizer())
        vae = VideoVAE(**sizes)
    parts: list[nn.Module] = [random_network(row, device, torch.bfloat16).to(home)]
    for module in (vae, text_encoder):
        randomize(module, device, lambda name: torch.bfloat16)
        parts.append(module.to(home))
    return Models(network=parts[0], vae=parts[1], text_encoder=parts[2])


def main() -> None:
    """Warm up, run once, print."""
    options = parse(Options, sys.argv[1:])
    device = torch.device(options.device)
    row = variant(options.variant)
    home = device if options.offload == "none" else torch.device("cpu")
    models = random_models(row, device, home)
    sampling = replace(row.sampling, steps=options.steps)
    width, height = map(int, options.size.split("x"))
    clip = Clip(prompts=[PROMPT], size=Size(width, height), frames=options.frames)
    mode = check_offload(options.offload)
    # the same shapes, so that every library has chosen its kernels
    Pipeline(models, replace(sampling, steps=1), device=device, offload=mode)(clip, [0])
    backend = torch.get_device_module(device)
    if device.type != "cpu":
        backend.empty_cache()
        backend.reset_peak_memory_stats()
    made = Pipeline(models, sampling, device=device, offload=mode)(clip, [1])
    if not made.frames.isfinite().all():
        raise SystemExit("the frames are not finite: not a time to quote")
    show(options, row, made.seconds, 0 if device.type == "cpu" else backend.max_memory_allocated(device))


def show(options: Options, row: Variant, seconds: dict[str, float], peak: int) -> None:
    """Print the table of stages."""
    table = Table(
        title=f"{row.name} {options.size}, {options.frames} frames, {options.steps} guided steps, bf16, "
        f"offload={options.offload}",
        title_justify="left",
    )
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for name, spent in seconds.items():
        table.add_row(name, f"{spent:.2f}")
    table.add_row("sum", f"{sum(seconds.values()):.2f}", end_section=True)
    table.add_row("peak memory, GiB", f"{peak / 2**30:.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
