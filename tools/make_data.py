"""Make what distillation trains on: shards of encoded clips with their text embeddings.

    python -m tools.make_data mode=sample dst=FOLDER prompt_file=FILE [ckpt=TEACHER] [repeat=1] [steps= ...]
    python -m tools.make_data mode=encode dst=FOLDER videos=FOLDER|csv=FILE [ckpt=...] [size= frames= fps=]
    python -m tools.make_data mode=text dst=FOLDER prompt_file=FILE [ckpt=...]
    python -m tools.make_data mode=negative dst=FILE.safetensors [ckpt=...] [negative_prompt="..."]

sample: the teacher's own clips.  encode: real videos.  text: prompts alone.  negative: one prompt.
The same command again makes the shards that are missing; under torchrun every process writes its own.
Options that infer.py has too mean the same here, but text_cache is none unless given; docs/data.md has more.
"""

import json
import os
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from distill.shard_files import WRITERS, write_context
from tools.data_jobs import Job, Mode, Options, build, embed, read, real_clips, teacher_clips, texts
from turbodiffusion.checkpoints.saving import write_json
from turbodiffusion.cli import one_sentence
from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.found import Found, find
from turbodiffusion.pipelines.generate import Pipeline
from turbodiffusion.pipelines.record import fingerprint

RECORD = "data.json"
JOBS = {Mode.sample: teacher_clips, Mode.encode: real_clips, Mode.text: texts}


@torch.no_grad()
def make_data(options: Options) -> str:
    """Do it, and say in a line what was done.  UserError for what can not be, before any weight is read."""
    found, dst, suffix = find(options), Path(options.dst).expanduser(), options.format.name
    if options.mode is Mode.negative:
        return make_negative(dst, options, found)
    job = JOBS[options.mode](options, found)
    given = {name: getattr(options, name) for name in ("samples_per_shard", "batch", "dtype")}
    given |= {"mode": options.mode.name, "format": suffix, "samples": job.samples}
    weights = {name: fingerprint(report.path)["quick_sha256"] for name, report in found.reports.items()}
    claim(dst, {**given, "weights": weights, **job.decided_by})
    shards = {
        dst / f"shard_{i:06d}.{suffix}": numbers
        for i, numbers in enumerate(parts(range(job.samples), options.samples_per_shard))
    }
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    own = list(shards.items())[rank::world]
    if missing := {file: numbers for file, numbers in own if not file.exists()}:
        fill(missing, job, build(options, found, job.sampling), options)
    return f"{dst}: {sum(file.exists() for file in shards)} of {len(shards)} shards are whole"


def claim(folder: Path, record: dict[str, object]) -> None:
    """Note what the folder is made of; UserError if it already holds something else."""
    file, record = folder / RECORD, json.loads(json.dumps(record))
    if not file.exists():
        if next(folder.glob("shard_*"), None):
            raise UserError(f"{folder} holds shards of unknown making: pass another dst=")
        try:
            write_json(file, record)
        except UserError:
            if not file.exists():  # else another process was first
                raise
    before = json.loads(file.read_text())
    if other := [name for name, value in record.items() if before.get(name) != value]:
        raise UserError(
            f"{folder} holds data with other {' and '.join(other)} (see {RECORD} there): repeat the command "
            "that began it, or pass another dst="
        )


def fill(shards: dict[Path, range], job: Job, pipeline: Pipeline, options: Options) -> None:
    """Make these shards, each in one go: files, and the numbers of their samples."""
    console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    for file, numbers in shards.items():
        # what a killed process left
        for stale in file.parent.glob(f".{file.name}.*.part"):
            stale.unlink()
        batches = track(parts(numbers, options.batch), file.name, console=console, transient=True)
        samples = [
            (key, sample.checked(f"sample {key} ({sample.prompt!r})"))
            for some in batches
            for key, sample in job.make(pipeline, some)
        ]
        if samples:
            WRITERS[options.format.name](file, samples)


def parts(numbers: range, count: int) -> list[range]:
    """The numbers, `count` at a time."""
    return [numbers[i : i + count] for i in range(0, len(numbers), count)]


def make_negative(dst: Path, options: Options, found: Found) -> str:
    """The embedding of what guidance leads away from."""
    if dst.suffix != ".safetensors":
        raise UserError(f"dst={dst}: an embedding is written as .safetensors")
    stated = options.negative_prompt
    prompt = found.sampling.negative_prompt if stated is None else stated
    context = embed(build(options, found, found.sampling), prompt).context
    write_context(dst, context, prompt)
    return f"{dst}: {tuple(context.shape)}, of {prompt!r}"


def main() -> None:
    """Entry point."""
    with one_sentence():
        print(make_data(read(sys.argv[1:])))


if __name__ == "__main__":
    main()
