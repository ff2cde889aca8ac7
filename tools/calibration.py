"""A network on prompts before and after it is quantised: what its layers read, and how far its latents go."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from turbodiffusion.checkpoints import Report, load_network, load_text_encoder, load_vae, locate
from turbodiffusion.checkpoints.loading import known_variant
from turbodiffusion.checkpoints.quantised import LINEARS, dequantise, quantise_tiles
from turbodiffusion.checkpoints.smoothing import Smoothing
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel
from turbodiffusion.pipelines.generate import Clip, Models, Pipeline, Watch
from turbodiffusion.pipelines.prompts import read_items
from turbodiffusion.pipelines.request import pick_device, pick_dtype
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.small_world.captions import held_out_prompts

# sums by layer, and the hooks to remove
Watched = tuple[dict[str, Tensor], list[RemovableHandle]]


def watch_outputs(network: WanModel, layers: list[str], scheme: str) -> Watched:
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

    return _watch(network, layers, add, lambda _: torch.zeros(2, dtype=torch.float64))


def watch_inputs(network: WanModel, layers: list[str]) -> Watched:
    """The largest number (in,) of each channel that a layer reads, which grow as the network runs."""

    def add(largest: Tensor, _: nn.Linear, inputs: tuple[Tensor], __: Tensor) -> None:
        torch.maximum(largest, inputs[0].flatten(0, -2).abs().amax(0).float(), out=largest)

    return _watch(network, layers, add, lambda layer: torch.zeros(layer.in_features))


def _watch(
    network: WanModel, layers: list[str], add: Callable[..., None], start: Callable[[nn.Linear], Tensor]
) -> Watched:
    sums, hooks = {}, []
    for layer in layers:
        module = network.get_submodule(layer)
        sums[layer] = start(module).to(module.weight.device)
        hooks.append(module.register_forward_hook(partial(add, sums[layer])))
    return sums, hooks


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
        files = {kind: locate(kind, getattr(row, kind), report.path) for kind in kinds}
        self.sampling = replace(report.sampling, steps=steps or report.sampling.steps)
        self.device = pick_device(device)
        where = {"device": self.device, "dtype": pick_dtype(dtype, self.device)}
        self._load = partial(load_network, variant=row.name, ema=ema, **where)
        self._encoders = lambda: {
            "vae": load_vae(files["vae"], **where),
            "text_encoder": load_text_encoder(files["text_encoder"], **where),
        }

    @cached_property
    def models(self) -> Models:
        """The original; loaded when it first runs."""
        return Models(network=self._load(self.report.path).network, **self._encoders())

    def run_inputs(self) -> dict[str, Tensor]:
        """Largest numbers of what each layer of the original reads, by channel."""
        if not self.prompts:
            raise UserError("smooth= needs to know what layers read: pass prompts=FILE.txt, a line each")
        return self._run(watch_inputs)

    def smooth(self, smoothing: Smoothing) -> None:
        """Change the original's network as the new file's tensors are, which computes what it did."""
        for name, tensor in self.models.network.state_dict().items():
            tensor.copy_(smoothing(name, tensor))

    def run_outputs(self, scheme: str) -> dict[str, float]:
        """Decibels of each layer's outputs in 8 bits; none without prompts.  Lets go of the original."""
        if not self.prompts:
            return {}
        powers = self._run(partial(watch_outputs, scheme=scheme))
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

    def _run(self, watch: Callable[[WanModel, list[str]], Watched]) -> dict[str, Tensor]:
        """What was watched while the original ran; its latents are kept."""
        watched, hooks = watch(self.models.network, list(self.report.linear))
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
        return [prompt.text for prompt in held_out_prompts(4)]
    return [] if said in ("auto", "none") else [item.prompt for item in read_items(Path(said).expanduser())]
