"""Where the time of a video goes, kernel by kernel: its denoising loop, as replayed, and its decoding.

    python -m tools.bench.profile variant=wan2.1_t2v_1.3b size=832x480 [rows=25]

Options are those of `python -m tools.bench`, with random weights too.  What it prints is time on the card: a
stage's seconds, less the sum of its kernels, are what the card spent waiting.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from tools.bench.generation import PROMPT, Options, build, change, random_models, ways
from tools.options import run
from turbodiffusion.pipelines.generate import Clip
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.pipelines.watch import Watch
from turbodiffusion.variants import variant

NAME_WIDTH = 80


@dataclass
class Profiled(Options):
    """The command line."""

    rows: int = 25


def show(stage: str, work: Callable[[], object], options: Profiled, console: Console) -> None:
    """Run a stage and print its kernels, the longest first."""
    device = torch.device(options.device)
    kind = ProfilerActivity.CPU if device.type == "cpu" else ProfilerActivity.CUDA
    with profile(activities=[kind]) as profiler:
        start = perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        spent = perf_counter() - start
    field = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    found = sorted(profiler.key_averages(), key=lambda row: -getattr(row, field))
    total = sum(getattr(row, field) for row in found) / 1e3
    title = f"{stage}: {1e3 * spent:.1f} ms, kernels {total:.1f} ms"
    table = Table("ms", "share", "calls", "kernel", title=title)
    for row in found[: options.rows]:
        ms = getattr(row, field) / 1e3
        table.add_row(f"{ms:.2f}", f"{ms / total:.1%}", str(row.count), escape(row.key[:NAME_WIDTH]))
    console.print(table)


@torch.no_grad()
def report(options: Profiled) -> None:
    """Make one video to warm up, and look at the next."""
    row, console = variant(options.variant), Console(width=120)
    models = random_models(row, torch.device(options.device))
    change(models, ways(options)[-1], options)
    pipeline = build(models, row, options)
    clip = Clip(prompts=[PROMPT], size=Size(*map(int, options.size.split("x"))), frames=options.frames)
    watch = Watch(pipeline.device)
    noise, encoded = pipeline.noise(clip, [0]), pipeline.encode(clip, watch)
    latents = pipeline.denoise(encoded, [0], watch, noise)
    pipeline.decode(latents, watch)
    show("denoise", lambda: pipeline.denoise(encoded, [0], watch, noise), options, console)
    show("decode", lambda: pipeline.decode(latents, watch), options, console)


main = partial(run, Profiled, report)

if __name__ == "__main__":
    main()
