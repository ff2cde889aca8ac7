"""Students beside their teacher, over numbers of steps: one table for the small world.

    python -m evaluation.students ckpts=[rcm:a.safetensors,b.safetensors,dmd:c.safetensors] dst=DIR
                                  [steps=[1,2,4]] [count=512] [seeds=16] [batch=64] [ratio=0.1]

`name:file` begins a group of training seeds, which the files after it join; a file before any is alone.
Every model answers the same held-out prompts from the same noise, each once, then the first few `seeds`
times.  The teacher does so again from other noise: what distance and diversity come to between equals.  With
ratio= all but the teacher keep that share of blocks in sparse-linear attention, also those that are dense.
DIR gets students.md and students.json.

accuracy    share of clips that the oracle reads as asked for (`evaluation/oracle.py`)
distance    Frechet distance to the teacher's clips (`evaluation/distribution.py`)
diversity   mean distance between the features of one prompt's clips, over the teacher's
latent MSE  to the teacher's latents from the same noise
seconds     of denoising for one clip, at this batch; the median
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from math import prod
from pathlib import Path
from statistics import mean, median, stdev

import torch
import yaml
from omegaconf import MISSING
from rich.console import Console
from rich.progress import track
from torch import Tensor

from evaluation.command import heading, line, run, write
from evaluation.distribution import COARSE, FINE, features, frechet_distance, spread
from evaluation.oracle import Accuracy, Oracle, Reading, accuracy
from evaluation.small_world import Setting, clip_of, load_models, wanted
from turbodiffusion.attention import sparsity
from turbodiffusion.checkpoints import LoadedNetwork, load_network
from turbodiffusion.checkpoints.saving import write_json
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import PATCH, WanModel
from turbodiffusion.pipelines.generate import Encoded, Pipeline, Watch
from turbodiffusion.small_world.captions import held_out_prompts
from turbodiffusion.small_world.sprites import load_sprites
from turbodiffusion.variants import CONFIGS, Sampling


@dataclass
class Options(Setting):
    """The command line."""

    ckpts: list[str] = MISSING
    dst: str = MISSING
    teacher: str = "assets/wan_tiny.safetensors"
    steps: list[int] = field(default_factory=lambda: [1, 2, 4])
    teacher_steps: int = 50
    seeds: int = 16
    diversity_prompts: int = 16
    batch: int = 64
    ratio: float | None = None


@dataclass(frozen=True)
class Scores(Accuracy):
    """One model at one number of steps.  distance: None of too few clips."""

    distance: float | None
    diversity: float
    latent_mse: float
    seconds: float


# heading, factor and decimals of each score
COLUMNS = {
    "subject": ("subject %", 100, 1),
    "motion": ("motion %", 100, 1),
    "background": ("background %", 100, 1),
    "all_three": ("all three %", 100, 1),
    "distance": ("Frechet distance", 1, 4),
    "diversity": ("diversity", 1, 3),
    "latent_mse": ("latent MSE", 1, 3),
    "seconds": ("seconds", 1, 4),
}


@dataclass(frozen=True)
class Row:
    """A line of the table: a score sheet for each training seed; sparsity: share of key blocks left out."""

    model: str
    steps: int
    sparsity: float
    files: list[str]
    runs: list[Scores]

    def line(self) -> str:
        """In Markdown; mean and standard deviation where there are several."""
        cells = [self.model, str(self.steps), f"{100 * self.sparsity:.0f}"]
        for score in fields(Scores):
            values = [getattr(run, score.name) for run in self.runs]
            _, factor, decimals = COLUMNS[score.name]
            if None in values:
                cells.append("n/a")
                continue
            error = f" ± {factor * stdev(values):.{decimals}f}" if len(values) > 1 else ""
            cells.append(f"{factor * mean(values):.{decimals}f}{error}")
        return line(cells)


@dataclass(frozen=True)
class Questions:
    """What every model is asked: one question a row of prompts and a seed; the first `count` once each.

    encoded: the contexts of all `count` prompts.  rows: (M,) int64, which of them.  truth: (count, 3) int64.
    """

    encoded: Encoded
    truth: Tensor
    rows: Tensor
    seeds: list[int]


@dataclass(frozen=True)
class Answers:
    """latents (M, z, T, h, w) fp32, readings of the first `count`, and seconds a clip."""

    latents: Tensor
    readings: list[Reading]
    seconds: float


def groups(words: Sequence[str]) -> dict[str, list[str]]:
    """The files of each group; `name:file` begins one or adds to it, and files without a name follow it."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        begun, colon, file = word.rpartition(":")
        name = begun or name
        found.setdefault(name or word, []).append(file if colon else word)
    return found


def ask(pipeline: Pipeline, options: Options) -> Questions:
    """The questions, with texts encoded once for all models."""
    few, seeds, count = options.diversity_prompts, options.seeds, options.count
    if not 1 <= few <= count or seeds < 2:
        raise UserError(
            f"diversity needs 2 seeds or more of 1 to count={count} prompts; got seeds={seeds} and "
            f"diversity_prompts={few}"
        )
    prompts = held_out_prompts(count, options.split)
    rows = torch.cat((torch.arange(count), torch.arange(few).repeat_interleave(seeds)))
    encoded = pipeline.encode(clip_of(prompts, pipeline.sampling), Watch(pipeline.device))
    return Questions(encoded, wanted(prompts), rows, [options.seed + i for i in range(len(rows))])


def answer(pipeline: Pipeline, questions: Questions, oracle: Oracle, batch: int) -> Answers:
    """Sample, decode and read, batch by batch.  Clips for diversity alone are not decoded."""
    latents: list[Tensor] = []
    readings: list[Reading] = []
    seconds: list[float] = []
    parts = torch.arange(len(questions.rows)).split(batch)
    said = f"{pipeline.sampling.sampler}, {pipeline.sampling.steps} steps"
    for part in track(parts, said, console=Console(stderr=True), transient=True):
        watch, encoded = Watch(pipeline.device), questions.encoded
        encoded = replace(encoded, context=encoded.context[questions.rows[part]])
        latents.append(pipeline.denoise(encoded, [questions.seeds[i] for i in part], watch).float())
        seconds.append(watch.seconds["denoise"] / len(part))
        if len(judged := latents[-1][: max(0, len(questions.truth) - int(part[0]))]):
            readings += oracle.read(pipeline.decode(judged, watch))
    return Answers(torch.cat(latents), readings, median(seconds))


def score(answers: Answers, teachers: Answers, questions: Questions) -> Scores:
    """Answers against the truth and the teacher's answers to the same questions."""
    count, prompts = len(questions.truth), int(questions.rows[-1]) + 1
    once, often = zip(*((a.latents[:count], a.latents[count:]) for a in (answers, teachers)), strict=True)
    coarse = [features(latents, COARSE) for latents in once]
    spreads = [spread(features(latents, FINE).unflatten(0, (prompts, -1))) for latents in often]
    return Scores(
        **asdict(accuracy(answers.readings, questions.truth)),
        distance=frechet_distance(*coarse) if count > coarse[0].shape[1] else None,
        diversity=spreads[0] / spreads[1],
        latent_mse=float((once[0] - once[1]).square().mean()),
        seconds=answers.seconds,
    )


def load_students(options: Options, teacher: WanModel) -> dict[str, list[LoadedNetwork]]:
    """Every group's networks; UserError for one that can not stand in for the teacher."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    found = {
        name: [load_network(file, device=device, dtype=dtype, quant=options.quant) for file in files]
        for name, files in groups(options.ckpts).items()
    }
    for each in chain(*found.values()):
        for size in ("in_channels", "text_dim"):
            if (got := each.network.config[size]) != (wants := teacher.config[size]):
                raise UserError(
                    f"{each.report.path} has {size} {got} but its teacher has {wants}; give its own"
                )
        if options.ratio is not None:
            sparsify(each.network, options.ratio)
    return found


def sparsify(network: WanModel, ratio: float) -> None:
    """Have the network keep another share of blocks; a dense one gets the small world's blocks."""
    asked = {"ratio": ratio}
    if network.config["attention"]["name"] == "dense":
        asked = yaml.safe_load((CONFIGS / "attention" / "sla_tiny.yaml").read_text()) | asked
    network.set_attention(asked)


def measure(options: Options) -> Iterator[Row]:
    """The rows of the table.  Whatever can not be loaded is refused before anything is sampled."""
    device = torch.device(options.device)
    models, sampling = load_models(options, options.teacher)
    students = load_students(options, models.network)

    def pipeline(network: WanModel, sampling: Sampling, steps: int) -> Pipeline:
        return Pipeline(replace(models, network=network), replace(sampling, steps=steps), device=device)

    teacher = pipeline(models.network, sampling, options.teacher_steps)
    oracle, questions = Oracle(load_sprites().to(device)), ask(teacher, options)
    truth = answer(teacher, questions, oracle, options.batch)

    def scores(pipeline: Pipeline, questions: Questions = questions) -> Scores:
        return score(answer(pipeline, questions, oracle, options.batch), truth, questions)

    def left_out(network: WanModel) -> float:
        return sparsity(network.config["attention"], truth.latents[0, 0].numel() // prod(PATCH))

    files, share = [options.teacher], left_out(models.network)
    yield Row("teacher", options.teacher_steps, share, files, [score(truth, truth, questions)])
    others = replace(questions, seeds=[seed + len(questions.seeds) for seed in questions.seeds])
    yield Row("teacher, other noise", options.teacher_steps, share, files, [scores(teacher, others)])
    for steps in options.steps:
        if steps != options.teacher_steps:
            runs = [scores(pipeline(models.network, sampling, steps))]
            yield Row("teacher", steps, share, files, runs)
    for name, loaded in students.items():
        files, share = [str(each.report.path) for each in loaded], left_out(loaded[0].network)
        for steps in options.steps:
            runs = [scores(pipeline(each.network, each.sampling, steps)) for each in loaded]
            yield Row(name, steps, share, files, runs)


def report(options: Options) -> None:
    """Print and write the table, line by line."""
    folder, rows, console = Path(options.dst).expanduser(), [], Console()
    lines = heading(["model", "steps", "sparsity %", *(COLUMNS[each.name][0] for each in fields(Scores))])
    for row in measure(options):
        rows.append(asdict(row))
        lines.append(row.line())
        console.print("\n".join(lines[-1:] if rows[1:] else lines), markup=False, soft_wrap=True)
        write_json(folder / "students.json", {"options": asdict(options), "rows": rows})
        write(folder, {"students.md": "\n".join(lines) + "\n"})


if __name__ == "__main__":
    run(Options, report)
