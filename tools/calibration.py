"""A network on prompts before and after it is quantised: what its layers read, and how far its latents go."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from turbodiffusion.checkpoints import Report, load_network, load_text_encoder, load_vae, locate
from turbodiffusion.checkpoints.loading import known_variant
from turbodiffusion.checkpoints.quantised import LINEARS, EightBits, dequantise
from turbodiffusion.checkpoints.smoothing import Smoothing
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel
from turbodiffusion.pipelines.generate import Clip, Models, Pipeline, Watch
from turbodiffusion.pipelines.prompts import read_items
from turbodiffusion.pipelines.request import pick_device, pick_dtype
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.small_world.captions import held_out_prompts

# layers that read the same: all but o and cross_attn.q of an attention, and a picture's beside a text's
_READERS = re.compile(r"(self_attn|cross_attn(?=\.[kv]))\.([qkv])(_img|)$")
Sums = TypeVar("Sums")
# of the small world, unless there are others
PROMPTS = 16
# by layer, and the hooks to remove
Watched = tuple[dict[str, Sums], list[RemovableHandle]]


def watch_outputs(network: WanModel, eight: Mapping[str, EightBits]) -> Watched[Tensor]:
    """Powers (2,) of each layer's outputs and of their errors in 8 bits, which grow as the network runs."""

    def add(name: str, layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        # made anew at each call: a copy for every layer would be another network
        off = in_eight_bits(layer, eight[name])(inputs[0]) - output
        for i, part in enumerate((output, off)):
            powers[name][i] += torch.linalg.vector_norm(part, dtype=torch.float32).square()

    device = network.patch_embedding.weight.device
    powers = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in eight}
    hooks = [network.get_submodule(name).register_forward_hook(partial(add, name)) for name in eight]
    return powers, hooks


def in_eight_bits(layer: nn.Linear, eight: EightBits) -> nn.Module:
    """A linear layer as it runs from a file with these 8 bits, which tiles do in floats."""
    numbers, scale = (part.to(layer.weight.device) for part in eight.quantise(layer.weight.detach()))
    if eight.scheme in LINEARS:
        return LINEARS[eight.scheme](numbers, scale, layer.bias)
    plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
    plain.weight, plain.bias = nn.Parameter(dequantise(numbers, scale).to(layer.weight.dtype)), layer.bias
    return plain


class Inputs:
    """Of what a layer reads: each channel's largest number (in,), and sums over tokens (in, in) of products.

    products: whether to have these, which take more memory than the weights.
    """

    def __init__(self, layer: nn.Linear, *, products: bool):
        width, device = layer.in_features, layer.weight.device
        self.largest = torch.zeros(width, device=device)
        self.products = torch.zeros(width, width, device=device) if products else None

    def add(self, _: nn.Linear, inputs: tuple[Tensor], __: Tensor) -> None:
        """As a hook of the layer."""
        x = inputs[0].flatten(0, -2).float()
        torch.maximum(self.largest, x.abs().amax(0), out=self.largest)
        if self.products is not None:
            self.products.addmm_(x.mT, x)


def watch_inputs(network: WanModel, layers: list[str], *, products: bool = False) -> Watched[Inputs]:
    """What each of the layers reads while the network runs; the same object for those that read the same."""
    seen: dict[str, Inputs] = {}
    hooks = []
    for name in layers:
        layer, read = network.get_submodule(name), _READERS.sub(r"\1\3", name)
        if read not in seen:
            seen[read] = Inputs(layer, products=products)
            hooks.append(layer.register_forward_hook(seen[read].add))
    return {name: seen[_READERS.sub(r"\1\3", name)] for name in layers}, hooks


class Comparison:
    """The original on prompts, and the new file beside it; what can not be compared is refused at once."""

    def __init__(
        self, report: Report, *, prompts: str, steps: int | None, device: str, dtype: str, ema: bool
    ):
        self.report = report
        self.prompts = _read_prompts(prompts, report)
        self.truth: Tensor | None = None
        if not self.prompts:
            return
        row = known_variant(report)
        if row.experts or "t2v" not in row.tasks:
            raise UserError(
                f"prompts= compares networks that make a video alone and from text, which {row.name} "
                "does not: leave it away, and compare runs of infer.py with quant=none and quant=auto"
            )
        kinds = ("vae", "text_encoder")
        self.files = {kind: locate(kind, getattr(row, kind), report.path) for kind in kinds}
        self.sampling = replace(report.sampling, steps=steps or report.sampling.steps)
        self.device = pick_device(device)
        self.where = {"device": self.device, "dtype": pick_dtype(dtype, self.device)}
        self._load = partial(load_network, variant=row.name, ema=ema, **self.where)

    @cached_property
    def models(self) -> Models:
        """The original; loaded when it first runs."""
        vae = load_vae(self.files["vae"], **self.where)
        text_encoder = load_text_encoder(self.files["text_encoder"], **self.where)
        network = self._load(self.report.path).network
        return Models(network=network, vae=vae, text_encoder=text_encoder)

    def run_inputs(self, *, products: bool) -> dict[str, Inputs]:
        """What the original's layers read."""
        if not self.prompts:
            raise UserError(
                "smooth= and gptq= need to know what layers read: pass prompts=FILE.txt, a line each"
            )
        inputs = self._run(partial(watch_inputs, layers=list(self.report.linear), products=products))
        if bad := [name for name, read in inputs.items() if not read.largest.isfinite().all()]:
            raise UserError(f"{bad[0]} reads NaN or infinities: mend the checkpoint, or pass dtype=float32")
        return inputs

    def smooth(self, smoothing: Smoothing) -> None:
        """Change the original's network as the new file's tensors are, which computes what it did."""
        for name, tensor in self.models.network.state_dict().items():
            tensor.copy_(smoothing(name, tensor))

    def run_outputs(self, eight: Mapping[str, EightBits]) -> dict[str, float]:
        """Decibels of each layer's outputs in 8 bits; none without prompts.  Lets go of the original."""
        if not self.prompts:
            return {}
        powers = self._run(partial(watch_outputs, eight=eight))
        self.models.network.to("meta")
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

    def _run(self, watch: Callable[[WanModel], Watched[Sums]]) -> dict[str, Sums]:
        """What was watched while the original ran; its latents are kept."""
        watched, hooks = watch(self.models.network)
        latents = self._latents(self.models)
        self.truth = latents if self.truth is None else self.truth
        for hook in hooks:
            hook.remove()
        return watched

    def _latents(self, models: Models) -> Tensor:
        pipeline = Pipeline(models, self.sampling, device=self.device)
        size, made = Size(*map(int, self.sampling.size.split("x"))), []
        for seed, prompt in enumerate(self.prompts):
            watch = Watch(self.device)
            encoded = pipeline.encode(Clip(prompts=[prompt], size=size, frames=self.sampling.frames), watch)
            made.append(pipeline.denoise(encoded, [seed], watch).double().cpu())
        return torch.cat(made)


def _read_prompts(said: str, report: Report) -> list[str]:
    if said == "auto" and report.variant == "wan_tiny":
        return [prompt.text for prompt in held_out_prompts(PROMPTS, "train")]
    return [] if said in ("auto", "none") else [item.prompt for item in read_items(Path(said).expanduser())]
