"""How fast this card makes a video, stage by stage, and what each part of the method gives; random weights.

    python -m tools.bench variant=wan2.1_t2v_1.3b size=832x480 steps=4 ratio=0.1 repeats=3 dst=runs/bench
    python -m tools.bench variant=wan2.1_t2v_14b size=1280x720 offload=stage cap=24 compare=false
    python -m tools.bench kernels=true

One run times the original way, 50 steps with guidance by dense attention, eager and with compiled blocks,
as 100 times one forward; a forward with each factor turned on in turn; and whole generations with all of
them, from text to file, on the same network.  attention=dense|sla|sla_int8, quant=none|int8|fp8 and
graph=auto|true|false say what is turned on; guided=true denoises as the original does; compare=false leaves
out all but the generations.  cap: GiB that generations may take of the card.  dst: a table in JSON and a
plot, .json and .png, are written there.
kernels=true runs the benchmarks of single kernels, each beside its floor, with the options they have alone:
norms, int8_linear, int8_block, sla, flash_jvp and vae, of which `python -m tools.bench.NAME` runs one; and
`python -m tools.bench.profile` lists the kernels of a generation.
"""

import importlib
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tools.bench.generation import FORWARDS, Measured, Options, measure
from tools.options import run
from turbodiffusion.checkpoints.files import appearing
from turbodiffusion.checkpoints.saving import write_json
from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.memory import GIB
from turbodiffusion.pipelines.record import environment

KERNELS = ("norms", "int8_linear", "int8_block", "sla", "flash_jvp", "vae")


def loops(measured: Measured, options: Options) -> dict[str, float]:
    """Seconds of denoising one video, by what is turned on: a few steps first, and last all, as measured."""
    forwards, steps = options.steps * (1 + options.guided), options.steps
    found = {f"50 guided steps, {way}": FORWARDS * spent for way, spent in measured.dense.items()}
    for i, (way, spent) in enumerate(measured.forwards.items()):
        found[f"+ {way}" if i else f"{steps} steps, dense, eager"] = forwards * spent
    return found | {"the loop as a whole": measured.stages["denoise"]}


def show(options: Options, measured: Measured, console: Console) -> None:
    """Print both tables."""
    title = f"{options.variant} {options.size}, {options.frames} frames, {options.steps} steps"
    table = Table("denoising", "seconds", "of the first", "of the one before", title=title)
    spent = loops(measured, options)
    first = before = next(iter(spent.values()))
    for name, value in spent.items():
        table.add_row(name, f"{value:.3f}", f"{first / value:.1f} x", f"{before / value:.2f} x")
        before = value
    if options.compare:
        console.print(table)
    table = Table("stage", "seconds", "of the first clip", title=f"{title}, text to file")
    names = [name for name in measured.first if name not in measured.stages]
    for name in (*names, *measured.stages):
        median = measured.stages.get(name)
        table.add_row(name, "-" if median is None else f"{median:.3f}", f"{measured.first[name]:.3f}")
    sums = (sum(part.values()) for part in (measured.stages, measured.first))
    table.add_row("sum", *(f"{value:.3f}" for value in sums), end_section=True)
    table.add_row("peak, GiB", f"{measured.peak / GIB:.1f}")
    console.print(table)


def draw(options: Options, measured: Measured, path: Path) -> None:
    """Write the plot: seconds of denoising, a bar for each factor."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'turbodiffusion[eval]'") from error
    spent = loops(measured, options)
    first, figure = next(iter(spent.values())), Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(spent), list(spent.values()))
    axes.bar_label(bars, [f" {value:.2f} s, {first / value:.0f} x" for value in spent.values()])
    axes.set(xscale="log", xlabel="seconds of denoising", title=f"{options.variant}, {options.size}")
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.grid(alpha=0.3, axis="x")
    with appearing(path) as part:
        figure.savefig(part, format="png", dpi=120)


def write(options: Options, measured: Measured, card: str) -> None:
    """The table and the plot."""
    stem = Path(options.dst).expanduser()
    stem.parent.mkdir(parents=True, exist_ok=True)
    content = {"device": card, "options": asdict(options), "environment": environment()}
    content |= {"denoising": loops(measured, options), **asdict(measured)}
    write_json(stem.with_name(f"{stem.name}.json"), content)
    if options.compare:
        draw(options, measured, stem.with_name(f"{stem.name}.png"))


def run_kernels() -> None:
    """The benchmarks of single kernels, with the options they have alone."""
    for name in KERNELS:
        sys.argv = [name]
        importlib.import_module(f"tools.bench.{name}").main()
        torch.cuda.empty_cache()


def report(options: Options) -> None:
    """Measure, print, write."""
    if options.kernels:
        run_kernels()
        return
    console = Console(width=120)
    card = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    console.print(f"{card}, torch {torch.__version__}, {asdict(options)}", markup=False)
    measured = measure(options)
    show(options, measured, console)
    if options.dst is not None:
        write(options, measured, card)


main = partial(run, Options, report)

if __name__ == "__main__":
    main()
