"""What a fast attention makes of a network's own queries, keys and values, beside exact attention.

    python -m evaluation.attention attention=sla_int8 [ckpt=FILE] [ratio=0.1] [block_q=N] [block_k=N]
                                   [against=dense] [count=4] [steps=N] [vae=FILE] [text_encoder=FILE]

The network samples held-out captions by the attention `against`; what it attends to in every layer and step
goes through the one on trial too.  Mean and worst over steps and heads, by layer and of all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from omegaconf import MISSING
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from evaluation.command import run
from evaluation.metrics.attention import AttentionFidelity
from evaluation.small_world import Setting, load_models
from turbodiffusion.attention import sparsity, spoken
from turbodiffusion.pipelines.generate import Clip, Pipeline
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.pipelines.watch import Watch
from turbodiffusion.small_world.captions import held_out_prompts


@dataclass
class Options(Setting):
    """The command line."""

    attention: str = MISSING
    against: str = "dense"
    ckpt: str = "assets/wan_tiny.safetensors"
    ratio: float | None = None
    block_q: int | None = None
    block_k: int | None = None
    count: int = 4
    steps: int | None = None


class Beside(nn.Module):
    """A core that also shows what another makes of its inputs."""

    def __init__(self, exact: nn.Module, trial: nn.Module, see: Callable[[Tensor, Tensor], None]):
        super().__init__()
        self.exact, self.trial, self.see = exact, trial, see

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, N, L, D) each -> what the exact core makes of them."""
        out = self.exact(q, k, v)
        self.see(self.trial(q, k, v), out)
        return out


def measure(options: Options) -> tuple[AttentionFidelity, str]:
    """Sample and watch -> what was seen, and the attention on trial in words."""
    models, sampling = load_models(options, options.ckpt)
    network, device = models.network, torch.device(options.device)
    given = {name: getattr(options, name) for name in ("ratio", "block_q", "block_k")}
    network.set_attention({"name": options.attention} | {n: x for n, x in given.items() if x is not None})
    attention, trials = network.config["attention"], [block.self_attn.core for block in network.blocks]
    network.set_attention({"name": options.against}, drop_linear=True)
    steps, size = options.steps or sampling.steps, Size(*map(int, sampling.size.split("x")))
    shape = {"layers": len(trials), "steps": steps, "heads": network.config["heads"]}
    metric, done, tokens = AttentionFidelity(**shape), 0, 0

    def see(layer: int, trial: Tensor, exact: Tensor) -> None:
        nonlocal tokens
        tokens = exact.shape[2]
        metric.update(trial, exact, layer=layer, step=done)

    def on_progress(stage: str, part: int, _: int) -> None:
        nonlocal done
        done = part if stage == "denoise" else done

    for layer, (block, trial) in enumerate(zip(network.blocks, trials, strict=True)):
        block.self_attn.core = Beside(block.self_attn.core, trial, lambda *out, layer=layer: see(layer, *out))
    prompts = [prompt.text for prompt in held_out_prompts(options.count, options.split)]
    pipeline = Pipeline(models, replace(sampling, steps=steps), device=device)
    encoded = pipeline.encode(
        Clip(prompts=prompts, size=size, frames=sampling.frames), watch := Watch(device)
    )
    seeds = [options.seed + i for i in range(options.count)]
    pipeline.denoise(encoded, seeds, replace(watch, on_progress=on_progress))
    return metric, f"{spoken(attention)}: {100 * sparsity(attention, tokens):.1f} % of blocks left out"


def table(metric: AttentionFidelity, title: str) -> Table:
    """The layers' lines, and that of all."""
    shown = Table("layer", title=title, title_justify="left")
    for name in (cells := metric.cells()):
        shown.add_column(f"{name}, mean and worst", justify="right")
    for layer in range(metric.seen.shape[0]):
        worst = [x[layer].min() if name == "cos_sim" else x[layer].max() for name, x in cells.items()]
        pairs = zip((x[layer].mean() for x in cells.values()), worst, strict=True)
        shown.add_row(str(layer), *(f"{mean:.4f}  {most:.4f}" for mean, most in pairs))
    of_all = metric.compute()
    shown.add_row("all", *(f"{of_all[name]:.4f}  {of_all[f'worst_{name}']:.4f}" for name in cells))
    return shown


if __name__ == "__main__":
    run(Options, lambda options: Console(width=120).print(table(*measure(options))))
