"""What a fast attention makes of a network's own queries, keys and values, beside exact attention.

    python -m evaluation.attention attention=sla_int8 [ckpt=FILE] [ratio=0.1] [block_q=N] [block_k=N]
                                   [against=dense] [count=4] [steps=N] [vae=FILE] [text_encoder=FILE]

The network samples held-out captions by the attention `against`; what it attends to in every layer and step
goes through the one on trial too.  Mean and worst over steps and heads, by layer and of all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from omegaconf import MISSING
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchmetrics import Metric

from evaluation.command import run
from evaluation.small_world import Setting, clip_of, load_models
from turbodiffusion.attention import sparsity, spoken
from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.generate import Pipeline
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


class AttentionFidelity(Metric):
    """Likeness and errors of flattened outputs, in fp64, for every layer, sampling step and head.

    cos_sim: their cosine.  relative_l1: sum |test - exact| / sum |exact|.  rmse: of their difference.
    """

    full_state_update = False
    is_differentiable = False

    sums: Tensor
    seen: Tensor

    def __init__(self, *, layers: int, steps: int, heads: int) -> None:
        super().__init__()
        cells = (layers, steps, heads)
        self.add_state("sums", torch.zeros(*cells, 6, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(cells, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, test: Tensor, exact: Tensor, *, layer: int, step: int) -> None:
        """Outputs (B, heads, L, D) of the attention on trial and of the exact one, for equal inputs."""
        if test.shape != exact.shape or test.ndim != 4 or test.shape[1] != self.seen.shape[2]:
            raise UserError(
                f"got outputs {tuple(test.shape)} and {tuple(exact.shape)}; "
                f"wanted two of (B, {self.seen.shape[2]}, L, D)"
            )
        x, y = (each.detach().double().to(self.sums.device) for each in (test, exact))
        terms = (x * y, x * x, y * y, (x - y).abs(), y.abs(), (x - y).square())
        self.sums[layer, step] += torch.stack([term.sum(dim=(0, 2, 3)) for term in terms], dim=-1)
        self.seen[layer, step] += x[:, 0].numel()

    def cells(self) -> dict[str, Tensor]:
        """Each measure (layers, steps, heads), NaN where nothing was seen."""
        dot, x2, y2, error, size, square = self.sums.unbind(-1)
        return {
            "cos_sim": dot / (x2 * y2).sqrt(),
            "relative_l1": error / size,
            "rmse": (square / self.seen).sqrt(),
        }

    def compute(self) -> dict[str, Tensor]:
        """Each measure's mean over what was seen, and as `worst_` its worst."""
        there = self.seen > 0
        if not there.any():
            raise UserError("no attention was seen: compute after update")
        return summary({name: values[there] for name, values in self.cells().items()})


def summary(cells: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each measure's mean, and as `worst_` its worst."""
    worst = {f"worst_{name}": x.min() if name == "cos_sim" else x.max() for name, x in cells.items()}
    return {name: x.mean() for name, x in cells.items()} | worst


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
    sizes = ("ratio", "block_q", "block_k")
    given = {name: x for name in sizes if (x := getattr(options, name)) is not None}
    network.set_attention({"name": options.attention} | given)
    attention, trials = network.config["attention"], [block.self_attn.core for block in network.blocks]
    network.set_attention({"name": options.against}, drop_linear=True)
    steps = options.steps or sampling.steps
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
    prompts, watch = held_out_prompts(options.count, options.split), Watch(device)
    pipeline = Pipeline(models, replace(sampling, steps=steps), device=device)
    encoded = pipeline.encode(clip_of(prompts, sampling), watch)
    seeds = [options.seed + i for i in range(options.count)]
    pipeline.denoise(encoded, seeds, replace(watch, on_progress=on_progress))
    return metric, f"{spoken(attention)}: {100 * sparsity(attention, tokens):.1f} % of blocks left out"


def table(metric: AttentionFidelity, title: str) -> Table:
    """The layers' lines, and that of all."""
    shown = Table("layer", title=title, title_justify="left")
    for name in (cells := metric.cells()):
        shown.add_column(f"{name}, mean and worst", justify="right")
    rows = {str(i): summary({name: x[i] for name, x in cells.items()}) for i in range(len(metric.seen))}
    for row, seen in (rows | {"all": metric.compute()}).items():
        shown.add_row(row, *(f"{seen[name]:.4f}  {seen[f'worst_{name}']:.4f}" for name in cells))
    return shown


if __name__ == "__main__":
    run(Options, lambda options: Console(width=120).print(table(*measure(options))))
