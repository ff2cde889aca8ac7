"""Make what distillation trains on: shards of encoded clips with their text embeddings.

    python -m tools.make_data mode=sample dst=FOLDER [ckpt=TEACHER] [prompt_file=FILE] [repeat=1] [steps= ...]
    python -m tools.make_data mode=encode dst=FOLDER [ckpt=...] videos=FOLDER|csv=FILE [size= frames= fps=]
    python -m tools.make_data mode=text dst=FOLDER [ckpt=...] [prompt_file=FILE]
    python -m tools.make_data mode=negative dst=FILE.safetensors [ckpt=...] [negative_prompt="..."]

sample: the teacher's own clips.  encode: real videos.  text: prompts alone.  negative: one prompt.
The same command again goes on where the last one stopped; under torchrun every process writes its own shards.
Options that infer.py has too mean the same here; docs/data.md has the rest.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from distill.shard_files import write_context
from tools.data_jobs import Frame, TeacherSamples, Texts, VideoClips, load_encoders
from tools.data_options import Machine, Mode, Options, check, infer_options
from tools.options import parse
from tools.shard_writer import Make, ShardSet
from tools.video_clips import list_csv, list_folder
from turbodiffusion.cli import one_sentence
from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.found import SMALL_WORLD, Found, find, load
from turbodiffusion.pipelines.generate import OnProgress
from turbodiffusion.pipelines.prompts import Item, read_items
from turbodiffusion.pipelines.record import fingerprint
from turbodiffusion.pipelines.request import choose_task, resolve
from turbodiffusion.pipelines.sizes import check_frames, check_size, parse_size
from turbodiffusion.samplers.noise import SEEDS
from turbodiffusion.small_world.captions import PHRASINGS, captions
from turbodiffusion.small_world.clips import draw_scenes
from turbodiffusion.small_world.sprites import subject_names


@dataclass(frozen=True)
class Work:
    """A mode's samples: how many, what decides them, and a function that loads what makes them."""

    samples: int
    decided_by: dict[str, object]
    start: Callable[[OnProgress], Make]
    text_only: bool = False


def make_data(options: Options) -> str:
    """Do it, and say in a line what was done.  UserError for what can not be, before any weight is read."""
    check(options)
    machine, found, dst = Machine.of(options), find(infer_options(options)), Path(options.dst).expanduser()
    if options.mode is Mode.negative:
        return make_negative(dst, options, found, machine)
    work = {Mode.sample: sampled, Mode.encode: encoded, Mode.text: texts}[options.mode](
        options, found, machine
    )
    shards = ShardSet(
        folder=dst,
        format=options.format.name,
        samples=work.samples,
        per_shard=options.samples_per_shard,
        batch=options.batch,
        text_only=work.text_only,
        rank=int(os.environ.get("RANK", "0")),
        world=int(os.environ.get("WORLD_SIZE", "1")),
    )
    weights = {name: fingerprint(report.path)["quick_sha256"] for name, report in found.reports.items()}
    sizes = {name: getattr(options, name) for name in ("samples_per_shard", "batch")}
    common = {"mode": options.mode.name, "format": shards.format, "samples": work.samples, **sizes}
    shards.claim({**common, "dtype": str(machine.dtype), "weights": weights, **work.decided_by})
    run(shards, work)
    return f"{dst}: {sum(file.exists() for file in shards.files)} of {len(shards.files)} shards are whole"


def run(shards: ShardSet, work: Work) -> None:
    """Make what is missing, under two bars: samples, and the present batch."""
    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=shards.rank > 0) as bars:
        samples, stage = (bars.add_task(name, total=None) for name in ("samples", "loading"))

        def on_progress(name: str, done: int, total: int) -> None:
            bars.update(stage, description=name, completed=done, total=total)

        bars.update(samples, total=sum(map(len, shards.own.values())))
        if not all(file.exists() for file in shards.own):
            shards.write(work.start(on_progress), lambda count: bars.advance(samples, count))


def sampled(options: Options, found: Found, machine: Machine) -> Work:
    """The teacher's clips."""
    items = read_prompts(options, found)
    first, samples = items[0], options.repeat * len(items)
    pictures = {name: str(x) for name in ("image", "last_image") if (x := getattr(first, name)) is not None}
    given = replace(infer_options(options), prompt=first.prompt, **pictures)
    request = resolve(given, found.variant, found.sampling, found.multiple())
    for item in items:
        if item.seed is not None or item.negative_prompt is not None:
            raise UserError("seed and negative_prompt hold for all samples: take them out of prompt_file")
        has = {"has_image": item.image is not None, "has_last": item.last_image is not None}
        if has != {"has_image": "image" in pictures, "has_last": "last_image" in pictures}:
            raise UserError("all prompts of a set must be alike: give each its picture, or none")
        for file in (item.image, item.last_image):
            if file is not None and not file.is_file():
                raise UserError(f"the image {file} does not exist")
    if options.seed not in SEEDS or options.seed + samples - 1 not in SEEDS:
        raise UserError(f"seed={options.seed}: with {samples} samples, take one from 0 to {SEEDS[-samples]}")
    frame = Frame(request.shots[0].size, request.frames)
    sampling = replace(request.sampling, negative_prompt=request.shots[0].negative_prompt)

    def start(on_progress: OnProgress) -> Make:
        pipeline = machine.pipeline(load, found, sampling)
        return TeacherSamples(pipeline, items, frame, options.seed, on_progress)

    what = {"sampling": asdict(sampling), "size": str(frame.size), "seed": options.seed}
    return Work(samples, {**what, "prompts": digest(items)}, start)


def encoded(options: Options, found: Found, machine: Machine) -> Work:
    """Real videos."""
    if (options.videos is None) == (options.csv is None):
        raise UserError("mode=encode takes videos=FOLDER or csv=FILE, one of them")
    folder, file = (None if x is None else Path(x).expanduser() for x in (options.videos, options.csv))
    videos = list_csv(file) if folder is None else list_folder(folder)
    size = parse_size(options.size or found.sampling.size, options.aspect)
    frame = Frame(check_size(size, found.multiple()), check_frames(options.frames or found.sampling.frames))
    tasks = found.variant.tasks
    with_picture = "t2v" not in tasks if options.with_picture is None else options.with_picture
    with_last = with_picture and "flf2v" in tasks
    choose_task(found.variant, has_image=with_picture, has_last=with_last)
    fps = options.fps or found.sampling.fps

    def start(on_progress: OnProgress) -> Make:
        pipeline = machine.pipeline(load_encoders, found, found.sampling)
        return VideoClips(
            pipeline, videos, frame, fps, with_picture + with_last, options.skip_broken, on_progress
        )

    what = {"size": str(frame.size), "frames": frame.frames, "fps": fps, "with_picture": with_picture}
    return Work(len(videos), {**what, "videos": digest(videos)}, start)


def texts(options: Options, found: Found, machine: Machine) -> Work:
    """Prompts alone."""
    prompts = [item.prompt for item in read_prompts(options, found)]

    def start(on_progress: OnProgress) -> Make:
        return Texts(machine.pipeline(load_encoders, found, found.sampling), prompts)

    return Work(len(prompts), {"prompts": digest(prompts)}, start, text_only=True)


def make_negative(dst: Path, options: Options, found: Found, machine: Machine) -> str:
    """The embedding of what guidance leads away from."""
    if dst.suffix != ".safetensors":
        raise UserError(f"dst={dst}: an embedding is written as .safetensors")
    stated = options.negative_prompt
    prompt = found.sampling.negative_prompt if stated is None else stated
    pipeline = machine.pipeline(load_encoders, found, found.sampling)
    ((_, sample),) = Texts(pipeline, [prompt])(range(1))
    write_context(dst, sample.context, prompt)
    return f"{dst}: {tuple(sample.context.shape)}, of {prompt!r}"


def read_prompts(options: Options, found: Found) -> list[Item]:
    """The first `count` prompts of the file, or captions of the small world's training split."""
    if options.prompt_file is not None:
        return read_items(Path(options.prompt_file).expanduser())[: options.count]
    if found.variant.name != SMALL_WORLD or options.count is None:
        raise UserError(
            "pass prompt_file=FILE (a prompt a line), or with the small world's model count= of its captions"
        )
    generator = torch.Generator().manual_seed(options.seed)
    scenes = draw_scenes(options.count, generator)
    phrasings = torch.randint(PHRASINGS, (options.count,), generator=generator)
    return [Item(text) for text in captions(scenes, subject_names(), phrasings)]


def digest(items: list[object]) -> str:
    """Changes with the items and their order."""
    return hashlib.sha256("\n".join(map(repr, items)).encode()).hexdigest()


def main() -> None:
    """Entry point."""
    with one_sentence():
        print(make_data(parse(Options, sys.argv[1:])))


if __name__ == "__main__":
    main()
