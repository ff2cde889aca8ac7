"""Put the linear layers of a network's blocks in 8 bits, and say what that costs.

    python -m tools.quantize src=FILE_OR_FOLDER dst=FILE [format=int8|fp8|turbodiffusion] [gptq=true]
                             [smooth=0.5] [budget=DB] [keep=NAME,...] [prompts=FILE.txt|none] [steps=N]
                             [variant=NAME] [overwrite=true]

int8 and fp8 (e4m3): a scale for each output channel, as they run; a .safetensors file.  turbodiffusion: the
published form, a scale for each 128 x 128 tile; a .pth file, which runs de-quantised unless quant=int8 is
passed to infer.py.  The original first makes latents of each line of prompts=, without it of 16 prompts if it
is the small world's: they show the error of every layer's outputs, and what the new file's are compared with.
They also show what layers read: gptq=true rounds weights by it (tools/rounding.py), smooth= divides outlying
channels of it (turbodiffusion/checkpoints/smoothing.py).
Layers of fewer decibels (SQNR: weights or outputs over their error) than the budget stay as they are, and so
do those with one of the names: ffn.2 is that layer of every block, blocks.0 all of one.  Tensors pass one at
a time, but gptq=true holds what it rounds by and makes; a .pth needs one copy.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tools.calibration import Comparison
from tools.convert import unsaid, write_shown
from tools.options import MISSING, run
from tools.rounding import once
from turbodiffusion.checkpoints.detect import Checkpoint, open_kind
from turbodiffusion.checkpoints.export import prepare
from turbodiffusion.checkpoints.keys import take_number
from turbodiffusion.checkpoints.quantised import FP8, INT8, TILES, EightBits
from turbodiffusion.checkpoints.smoothing import Smoothing
from turbodiffusion.checkpoints.sources import Entries
from turbodiffusion.errors import UserError

Format = Enum("Format", ["int8", "fp8", "turbodiffusion"])
# the scheme of the numbers, the format of the file and its suffix
WRITTEN = {
    Format.int8: (INT8, "ours", ".safetensors"),
    Format.fp8: (FP8, "ours", ".safetensors"),
    Format.turbodiffusion: (TILES, "turbodiffusion", ".pth"),
}


@dataclass
class Options:
    """ema: a training checkpoint's average, not its weights; device and dtype are those of the comparison."""

    src: str = MISSING
    dst: str = MISSING
    format: Format = Format.int8
    smooth: float = 0.0
    gptq: bool = False
    budget: float = 0.0
    keep: str = ""
    prompts: str = "auto"
    steps: int | None = None
    variant: str | None = None
    ema: bool = True
    device: str = "auto"
    dtype: str = "auto"
    overwrite: bool = False


def quantize(options: Options) -> None:
    """Do it, printing the layers' decibels, what was written and how far its latents are off."""
    (scheme, format, suffix), console = WRITTEN[options.format], Console()
    dst = check(options)
    checkpoint = open_kind(options.src, "network", variant=options.variant, ema=options.ema)
    report = checkpoint.report
    if scheme in report.quantised.values():
        raise UserError(f"{report.path} is quantised in this way already; give the file it was made from")
    kept = kept_by_name(options.keep, list(report.linear))
    same = {name: getattr(options, name) for name in ("prompts", "steps", "device", "dtype", "ema")}
    comparison = Comparison(report, **same)
    eight, changed = in_eight_bits(checkpoint, comparison, options, scheme)
    bar = track(eight.items(), "measuring", console=Console(stderr=True), transient=True)
    measured = {layer: weight.decibels() for layer, weight in bar}
    outputs = comparison.run_outputs(eight)
    worse = {layer: min(quality, outputs.get(layer, math.inf)) for layer, quality in measured.items()}
    kept |= {layer for layer, quality in worse.items() if quality < options.budget}
    chosen = [layer for layer in measured if layer not in kept]
    console.print(layer_table(measured, outputs, kept))
    if not chosen:
        raise UserError("every layer would stay as it is; lower budget= or shorten keep=")
    deed = {"quantised": report.path.name, "from": report.format, "quant": scheme, "kept": sorted(kept)}
    deed |= {name: value for name in ("smooth", "gptq") if (value := getattr(options, name))}
    entries, metadata = prepare(checkpoint, None, deed)
    entries = changed(entries)
    for layer in chosen:
        del entries[f"{layer}.weight"]
        entries |= eight[layer].entries()
    write_shown(entries, metadata, dst, format)
    line = f"{report.path} -> {dst} ({scheme}): {len(chosen)} of {len(measured)} linear layers, "
    line += f"{dst.stat().st_size / 1e9:.3f} GB" + (unsaid(report) if suffix == ".pth" else "")
    console.print(line, soft_wrap=True)
    if comparison.prompts:
        console.print(comparison.run_new(dst), soft_wrap=True)


def check(options: Options) -> Path:
    """The file to write.  Raises UserError for options that do not fit each other."""
    dst = Path(options.dst).expanduser()
    scheme, _, suffix = WRITTEN[options.format]
    if dst.suffix != suffix:
        raise UserError(f"format={options.format.name} writes a {suffix} file; got {dst}")
    if dst.exists() and not options.overwrite:
        raise UserError(f"{dst} exists; pass overwrite=true to replace it, or another dst=")
    if not 0 <= options.smooth <= 1:
        raise UserError(f"smooth={options.smooth}: take 0.5, or any strength up to 1; 0 leaves all as it is")
    if options.gptq and scheme == TILES:
        raise UserError("gptq=true is for format=int8 and format=fp8; the published form has a formula")
    return dst


def in_eight_bits(
    checkpoint: Checkpoint, comparison: Comparison, options: Options, scheme: str
) -> tuple[dict[str, EightBits], Callable[[Entries], Entries]]:
    """The linear layers in 8 bits, as the options say, and how the network's tensors change beside them."""
    floats, inputs, changed, by = checkpoint.floats(torch.float32), {}, dict, {}
    if options.smooth or options.gptq:
        inputs = comparison.run_inputs(products=options.gptq)
    if options.smooth:
        largest = {layer: read.largest for layer, read in inputs.items()}
        smoothing = Smoothing(checkpoint.report.config, floats, largest, options.smooth)
        comparison.smooth(smoothing)
        changed, by = smoothing.entries, smoothing.columns
        floats = changed(floats)
    eight = {}
    for layer in checkpoint.report.linear:
        weight = f"{layer}.weight"
        quantise = once(inputs[layer].products, by.get(weight), scheme) if options.gptq else None
        eight[layer] = EightBits(layer, floats[weight], scheme, quantise)
    return eight, changed


def kept_by_name(names: str, layers: list[str]) -> set[str]:
    """The layers that have one of these names, such as blocks.3, ffn.2 or self_attn, in theirs."""
    kept = set()
    for name in filter(None, names.strip("[]").replace(" ", "").split(",")):
        found = {layer for layer in layers if f".{name}." in f".{layer}."}
        if not found:
            kinds = ", ".join(dict.fromkeys(map(_kind, layers)))
            raise UserError(
                f"keep={name} is no layer of this network: name blocks, such as blocks.0, or {kinds}"
            )
        kept |= found
    return kept


def layer_table(weights: dict[str, float], outputs: dict[str, float], kept: set[str]) -> Table:
    """Decibels by kind of layer; without a run there are none of outputs."""
    kinds = defaultdict(list)
    for layer in weights:
        kinds[_kind(layer)].append(layer)
    table = Table("layer", title="signal over error, dB, mean and worst", title_justify="left")
    for heading in ("layers", "weights", "outputs", "kept"):
        table.add_column(heading, justify="right")
    for kind, layers in kinds.items():
        both = [[measured[layer] for layer in layers if measured] for measured in (weights, outputs)]
        shown = [f"{mean(values):.1f}  {min(values):.1f}" if values else "-" for values in both]
        table.add_row(kind, str(len(layers)), *shown, str(sum(layer in kept for layer in layers)))
    return table


def _kind(layer: str) -> str:
    return take_number(layer)[0].removeprefix("blocks.{}.")


main = partial(run, Options, quantize)

if __name__ == "__main__":
    main()
