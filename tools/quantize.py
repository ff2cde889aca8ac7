"""Put the linear layers of a network's blocks in 8 bits, and say what that costs.

    python -m tools.quantize src=FILE_OR_FOLDER dst=FILE [format=int8|fp8|turbodiffusion] [budget=DB]
                             [keep=NAME,...] [prompts=FILE.txt|none] [steps=N] [variant=NAME] [overwrite=true]

int8 and fp8 (e4m3): a scale for each output channel, as they run; a .safetensors file.  turbodiffusion: the
published form, a scale for each 128 x 128 tile; a .pth file, which runs de-quantised unless quant=int8 is
passed to infer.py.  The original first makes latents of each line of prompts=, without it of four prompts if
it is the small world's: they show the error of every layer's outputs, and what the new file's are compared
with.  Layers of fewer decibels (SQNR: weights or outputs over their error) than the budget stay as they are,
and so do those with one of the names: ffn.2 is that layer of every block, blocks.0 all of one.  Tensors pass
one at a time; a .pth needs one copy.
"""

import math
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from tools.convert import unsaid, write_shown
from tools.options import MISSING, parse
from turbodiffusion.checkpoints import Report, load_network, load_text_encoder, load_vae, locate
from turbodiffusion.checkpoints.detect import open_kind
from turbodiffusion.checkpoints.export import prepare
from turbodiffusion.checkpoints.keys import take_number
from turbodiffusion.checkpoints.loading import known_variant
from turbodiffusion.checkpoints.quantised import FP8, INT8, TILES, EightBits, dequantise, quantise_tiles
from turbodiffusion.cli import one_sentence
from turbodiffusion.errors import UserError
from turbodiffusion.models.int8 import LINEARS
from turbodiffusion.models.wan import WanModel
from turbodiffusion.pipelines.generate import Clip, Models, Pipeline, Watch
from turbodiffusion.pipelines.prompts import read_items
from turbodiffusion.pipelines.request import pick_device, pick_dtype
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.small_world.captions import held_out_prompts

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
    budget: float = 0.0
    keep: str = ""
    prompts: str = "auto"
    steps: int | None = None
    variant: str | None = None
    ema: bool = True
    device: str = "auto"
    dtype: str = "auto"
    overwrite: bool = False


def quantize(options: Options, console: Console) -> None:
    """Do it, printing the layers' decibels, what was written and how far its latents are off."""
    dst = Path(options.dst).expanduser()
    scheme, format, suffix = WRITTEN[options.format]
    if dst.suffix != suffix:
        raise UserError(f"format={options.format.name} writes a {suffix} file; got {dst}")
    if dst.exists() and not options.overwrite:
        raise UserError(f"{dst} exists; pass overwrite=true to replace it, or another dst=")
    checkpoint = open_kind(options.src, "network", variant=options.variant, ema=options.ema)
    report = checkpoint.report
    if scheme in report.quantised.values():
        raise UserError(f"{report.path} is quantised in this way already; give the file it was made from")
    kept = kept_by_name(options.keep, list(report.linear))
    comparison = Comparison(options, report)
    floats = checkpoint.floats(torch.float32)
    eight = {layer: EightBits(layer, floats[f"{layer}.weight"], scheme) for layer in report.linear}
    bar = track(eight.items(), "measuring", console=Console(stderr=True), transient=True)
    measured = {layer: weight.decibels() for layer, weight in bar}
    outputs = comparison.run_original(scheme)
    worse = {layer: min(quality, outputs.get(layer, math.inf)) for layer, quality in measured.items()}
    kept |= {layer for layer, quality in worse.items() if quality < options.budget}
    chosen = [layer for layer in measured if layer not in kept]
    console.print(layer_table(measured, outputs, kept))
    if not chosen:
        raise UserError("every layer would stay as it is; lower budget= or shorten keep=")
    deed = {"quantised": report.path.name, "from": report.format, "quant": scheme, "kept": sorted(kept)}
    entries, metadata = prepare(checkpoint, None, deed)
    for layer in chosen:
        del entries[f"{layer}.weight"]
        entries |= eight[layer].entries()
    write_shown(entries, metadata, dst, format)
    line = f"{report.path} -> {dst} ({scheme}): {len(chosen)} of {len(measured)} linear layers, "
    line += f"{dst.stat().st_size / 1e9:.3f} GB" + (unsaid(report) if suffix == ".pth" else "")
    console.print(line, soft_wrap=True)
    if comparison.prompts:
        console.print(comparison.run_new(dst), soft_wrap=True)


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


def watch_outputs(network: WanModel, layers: list[str], scheme: str) -> dict[str, Tensor]:
    """Powers (2,) of each layer's outputs and of their errors in 8 bits, which grow as the network runs."""

    def add(powers: Tensor, layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        (x,) = inputs
        # in 8 bits anew at each call: a copy for every layer would be another network
        if scheme in LINEARS:
            off = LINEARS[scheme].from_linear(layer)(x) - output
        else:
            off = F.linear(x, (dequantise(*quantise_tiles(layer.weight)) - layer.weight).to(x.dtype))
        for i, part in enumerate((output, off)):
            powers[i] += torch.linalg.vector_norm(part, dtype=torch.float32).square()

    device = network.patch_embedding.weight.device
    powers = {layer: torch.zeros(2, dtype=torch.float64, device=device) for layer in layers}
    for layer in layers:
        network.get_submodule(layer).register_forward_hook(partial(add, powers[layer]))
    return powers


class Comparison:
    """The new file beside the original; what can not be compared is refused before any work."""

    def __init__(self, options: Options, report: Report):
        self.options, self.report = options, report
        self.prompts: list[str] = []
        if options.prompts == "auto" and report.variant == "wan_tiny":
            self.prompts = [prompt.text for prompt in held_out_prompts(4)]
        elif options.prompts not in ("auto", "none"):
            self.prompts = [item.prompt for item in read_items(Path(options.prompts).expanduser())]
        if not self.prompts:
            return
        self.row = known_variant(report)
        if self.row.experts or "t2v" not in self.row.tasks:
            raise UserError(
                f"prompts= compares networks that make a video alone and from text, which {self.row.name} "
                "does not: leave it away, and compare runs of infer.py with quant=none and quant=auto"
            )
        kinds = ("vae", "text_encoder")
        self.files = {kind: locate(kind, getattr(self.row, kind), report.path) for kind in kinds}
        self.sampling = replace(report.sampling, steps=options.steps or report.sampling.steps)
        self.device = pick_device(options.device)
        self.where = {"device": self.device, "dtype": pick_dtype(options.dtype, self.device)}
        self._load = partial(load_network, variant=self.row.name, **self.where)

    def run_original(self, scheme: str) -> dict[str, float]:
        """The original's latents are kept -> decibels of each layer's outputs, none without prompts."""
        if not self.prompts:
            return {}
        network = self._load(self.report.path, ema=self.options.ema).network
        self.models = Models(
            network=network,
            vae=load_vae(self.files["vae"], **self.where),
            text_encoder=load_text_encoder(self.files["text_encoder"], **self.where),
        )
        powers = watch_outputs(network, list(self.report.linear), scheme)
        self.truth = self._latents(self.models)
        network.to("meta")  # lets go of its memory
        return {layer: 10 * math.log10(signal / error) for layer, (signal, error) in powers.items()}

    def run_new(self, dst: Path) -> str:
        """How far the new file's latents are off, in words; it runs as it says."""
        new = self._load(dst, quant="auto").network
        # which a .pth can not say
        new.set_attention(self.report.config["attention"], drop_linear=True)
        truth = self.truth
        error = self._latents(replace(self.models, network=new)) - truth
        share = (error.norm() / truth.norm()).item()
        peak = 20 * math.log10((truth.max() - truth.min()) / error.square().mean().sqrt())
        return (
            f"latents of {len(self.prompts)} prompts, {self.sampling.steps} steps, equal seeds, against the "
            f"original's: relative error {share:.2e}, PSNR {peak:.1f} dB"
        )

    def _latents(self, models: Models) -> Tensor:
        pipeline = Pipeline(models, self.sampling, device=self.device)
        size, made = Size(*map(int, self.sampling.size.split("x"))), []
        for seed, prompt in enumerate(self.prompts):
            watch = Watch(self.device)
            encoded = pipeline.encode(Clip(prompts=[prompt], size=size, frames=self.sampling.frames), watch)
            made.append(pipeline.denoise(encoded, [seed], watch).double().cpu())
        return torch.cat(made)


def main() -> None:
    """Entry point."""
    with one_sentence():
        quantize(parse(Options, sys.argv[1:]), Console())


if __name__ == "__main__":
    main()
