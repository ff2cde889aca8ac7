"""What `python infer.py` does: plan, load, generate, write.  The only part that talks."""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from turbodiffusion.attention import spoken
from turbodiffusion.checkpoints.saving import write_json
from turbodiffusion.errors import UserError
from turbodiffusion.parallel import check_heads, neighbours, own_device, rank, started, world_size
from turbodiffusion.pipelines.conditioning import prepare
from turbodiffusion.pipelines.found import Found, find, load, stages
from turbodiffusion.pipelines.generate import Clip, Pipeline
from turbodiffusion.pipelines.graphs import check_graph
from turbodiffusion.pipelines.memory import Free, Plan, free_memory, readable
from turbodiffusion.pipelines.offload import check_offload
from turbodiffusion.pipelines.options import Options
from turbodiffusion.pipelines.record import command, environment, fingerprint
from turbodiffusion.pipelines.request import Request, Shot, pick_device, pick_dtype, resolve
from turbodiffusion.pipelines.texts import cache_folder
from turbodiffusion.pipelines.together import is_shared, only, own_share, together
from turbodiffusion.pipelines.video_io import (
    Take,
    beside,
    growing_video,
    read_picture,
    to_uint8,
    write_picture,
)
from turbodiffusion.pipelines.watch import OnProgress, Watch

_Right = partial(Column, justify="right")


def generate(options: Options) -> None:
    """Make the videos the options ask for; UserError for what can not be, before any weight is read."""
    console = Console(stderr=True, quiet=started()[0] > 0)
    note = partial(console.print, style="yellow", markup=False, highlight=False)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: note(f"note: {message}")
        device = own_device(pick_device(options.device))
        dtype = pick_dtype(options.dtype, device)
        found = find(options)
        if is_shared(options):
            check_heads(found.reports["network"].config["heads"], started()[1])
        request = resolve(options, found.variant, found.sampling, found.multiple())
        plan = make_plan(options, found, request, dtype, free_memory(device))
        ways = {"compiled": options.compile, "shared": is_shared(options)}
        graph = check_graph(options.graph, device, plan.offload, **ways)
        # every "auto" and every default that is used, written out
        sampled = ("steps", "shift", "sigma_max", "boundary", "frames", "fps", "sampler")
        settled = replace(
            options,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            graph=str(graph).lower(),
            tiling=str(plan.tiled).lower(),
            text_cache=str(cache_folder(options.text_cache) or "none"),
            attention=found.attention["name"],
            quant=found.quant,
            **{name: found.attention.get(name) for name in ("ratio", "block_q", "block_k")},
            **{name: getattr(request.sampling, name) for name in sampled},
        )
        title = f"{found.variant.name}, {device}, {settled.dtype}, quant {found.quant}, "
        title += f"attention {spoken(found.attention)}"
        _show_plan(console, plan, title)
        todo = own_share(options, request.shots)
        todo = _unfinished(console, todo) if options.prompt_file else todo
        if todo and not options.plan_only:
            with together(options, device):
                Run(console, settled, found, request).all(todo)


def make_plan(options: Options, found: Found, request: Request, dtype: torch.dtype, free: Free) -> Plan:
    """The memory plan of the largest shot; with tiling=auto the VAE works in tiles only where it must."""
    choices = {"true": (True,), "false": (False,), "auto": (False, True)}
    if options.tiling not in choices:
        raise UserError(f"tiling={options.tiling} is not one of {', '.join(choices)}.")
    largest = max((shot.size for shot in request.shots), key=lambda size: size.width * size.height)
    offload = check_offload(options.offload)
    for tiled in choices[options.tiling]:
        plan = Plan(stages(found, largest, request.frames, dtype, tiled=tiled), offload, tiled, *free)
        if plan.fits(offload):
            break
    return plan


class Run:
    """The models of one run and the files they write."""

    def __init__(self, console: Console, options: Options, found: Found, request: Request):
        self.console, self.options, self.request = console, options, request
        device, offload = torch.device(options.device), check_offload(options.offload)
        loading = Watch(device)
        with console.status("loading the models"), loading.stage("loading"):
            home = device if offload == "none" else torch.device("cpu")
            dtype, texts = pick_dtype(options.dtype, device), cache_folder(options.text_cache)
            models = load(found, device=home, dtype=dtype, text_cache=texts)
        self.pipeline = Pipeline(
            models,
            request.sampling,
            device=device,
            offload=offload,
            tiled=options.tiling == "true",
            ode=options.ode,
            graph=options.graph == "true",
            compile=options.compile,
            ranks=neighbours(world_size()) if is_shared(options) else None,
        )
        self.seconds = Counter(loading.seconds)
        files = {name: report.path for name, report in found.reports.items()}
        files |= {"tokenizer": found.tokenizer} if found.tokenizer else {}
        self.made_by = {
            "variant": found.variant.name,
            "sampling": asdict(request.sampling),
            "times": self.pipeline.times.tolist(),
            "files": {name: fingerprint(path) for name, path in files.items()},
            "environment": environment(),
            "processes": world_size() if is_shared(options) else 1,
            "loading_seconds": round(loading.seconds["loading"], 3),
        }

    def all(self, shots: Sequence[Shot]) -> None:
        """Make every shot, then say how long each stage took."""
        for shot in shots:
            self._make(shot)
        self._show_seconds(sum(len(shot.outputs) for shot in shots))

    def _make(self, shot: Shot) -> None:
        files = {"image": shot.image, "last_image": shot.last_image}
        pictures = {name: prepare(read_picture(file), shot.size) for name, file in files.items() if file}
        clip = Clip(
            prompts=[shot.prompt],
            negative=shot.negative_prompt,
            size=shot.size,
            frames=self.request.frames,
            **pictures,
        )
        with _progress(self.console, shot.prompt) as on_progress:
            shared = Watch(self.pipeline.device, on_progress)
            noise = self.pipeline.noise(clip, [next(iter(shot.outputs))])
            encoded = self.pipeline.encode(clip, shared)
            self.seconds.update(shared.seconds)
            for seed, path in shot.outputs.items():
                watch = Watch(self.pipeline.device, on_progress)
                latents = self.pipeline.denoise(encoded, [seed], watch, noise)
                noise = None  # the first seed's alone
                with ExitStack() as writing:
                    # of processes that share a video, the first
                    take = writing.enter_context(self._writing(path)) if rank() == 0 else None
                    self.pipeline.decode(latents, watch, take)
                    self.pipeline.residence.release()
                    with watch.stage("write"):  # what is left of it
                        writing.close()
                self.seconds.update(watch.seconds)
                if take is None:
                    continue
                # the JSON comes last: where it is, the video is whole
                record = self._record(shot, seed, path, shared.seconds | watch.seconds)
                write_json(path.with_suffix(".json"), record)
                Console().print(str(path), soft_wrap=True, highlight=False, markup=False)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[Take]:
        """What takes the frames (1, 3, F, H, W) of a file, while the rest is being decoded."""
        if self.request.frames == 1:
            yield lambda frames: write_picture(path, to_uint8(frames[0]))
        else:
            video = growing_video(path, fps=self.request.sampling.fps, crf=self.options.crf)
            with video as append, beside(append) as take:
                yield lambda frames: take(frames[0])

    def _record(self, shot: Shot, seed: int, path: Path, seconds: dict[str, float]) -> dict[str, object]:
        """The JSON: the command that makes this file alone, what it resolved to, and what made it."""
        names = ("prompt", "negative_prompt", "image", "last_image", "size")
        own = {name: str(value) for name in names if (value := getattr(shot, name)) is not None}
        alone = {"prompt_file": None, "parallel": "none", "adaptive": False}
        alone |= {"seed": seed, "num_samples": 1, "out": str(path)}
        options = replace(self.options, **own, **alone)
        spent = {"seconds": {name: round(each, 3) for name, each in seconds.items()}}
        return {"command": command(options), "options": asdict(options), **self.made_by, **spent}

    def _show_seconds(self, clips: int) -> None:
        title = f"seconds, {clips} file{'s' * (clips != 1)}"
        table = Table("stage", _Right("total"), _Right("each"), title=title, title_justify="left")
        loading = self.seconds.pop("loading")
        table.add_row("loading", f"{loading:.2f}", end_section=True)
        for name, spent in self.seconds.items():
            table.add_row(name, f"{spent:.2f}", f"{spent / clips:.2f}")
        table.add_section()
        total = self.seconds.total()
        table.add_row("all but loading", f"{total:.2f}", f"{total / clips:.2f}")
        self.console.print(table)


def _unfinished(console: Console, shots: Sequence[Shot]) -> list[Shot]:
    """The shots with the files that do not exist."""

    def is_made(path: Path) -> bool:
        return path.exists() and path.with_suffix(".json").exists()

    left = only(shots, lambda path: not is_made(path))
    count, missing = (sum(len(shot.outputs) for shot in part) for part in (shots, left))
    if kept := count - missing:
        console.print(f"{kept} of {count} files exist and are kept; delete one to make it again")
    return left


def _show_plan(console: Console, plan: Plan, title: str) -> None:
    columns = ("model", _Right("weights"), _Right("at work"))
    table = Table(*columns, title=f"memory plan: {title}", title_justify="left")
    for stage in plan.stages:
        table.add_row(stage.name, readable(stage.weights), readable(stage.activations + stage.constants))
    console.print(table)
    console.print(plan.verdict() + (" The VAE works in tiles." if plan.tiled else ""))


@contextmanager
def _progress(console: Console, prompt: str) -> Iterator[OnProgress]:
    """A line per stage, with its bar, steps and time."""
    console.print(prompt, markup=False, highlight=False)
    columns = (TextColumn("  {task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report
