"""What `python infer.py` does: plan, load, generate, write.  The only part that talks."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from turbodiffusion.attention import spoken
from turbodiffusion.checkpoints.saving import write_json
from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.conditioning import prepare
from turbodiffusion.pipelines.found import Found, find, load, stages
from turbodiffusion.pipelines.generate import Clip, OnProgress, Pipeline, Watch
from turbodiffusion.pipelines.memory import Free, Plan, free_memory, readable
from turbodiffusion.pipelines.offload import check_offload
from turbodiffusion.pipelines.options import Options
from turbodiffusion.pipelines.record import absolute, command, environment, fingerprint
from turbodiffusion.pipelines.request import Request, Shot, pick_device, pick_dtype, resolve
from turbodiffusion.pipelines.video_io import to_uint8, write_picture, write_video

STAGES = ("loading", "text", "image", "denoise", "decode", "write")


def generate(options: Options) -> None:
    """Make the videos the options ask for; UserError for what can not be, before any weight is read."""
    console = Console(stderr=True)
    with _notes(console):
        device = pick_device(options.device)
        dtype = pick_dtype(options.dtype, device)
        found = find(options)
        request = resolve(options, found.variant, found.sampling, found.multiple())
        plan = make_plan(options, found, request, dtype, free_memory(device))
        title = f"{found.variant.name}, {device}, {str(dtype).removeprefix('torch.')}"
        _show_plan(console, plan, f"{title}, attention {spoken(found.attention)}")
        if options.plan_only:
            return
        todo = _unfinished(console, request, is_resumed=options.prompt_file is not None)
        if todo:
            settled = _settle(options, found, request, plan, device, dtype)
            Run(console, settled, found, request, device).all(todo)


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

    def __init__(
        self, console: Console, options: Options, found: Found, request: Request, device: torch.device
    ):
        self.console, self.options, self.found, self.request = console, options, found, request
        self.seconds = dict.fromkeys(STAGES, 0.0)
        start = perf_counter()
        with console.status("loading the models"):
            home = device if options.offload == "none" else torch.device("cpu")
            models = load(found, device=home, dtype=pick_dtype(options.dtype, device))
        self.seconds["loading"] = perf_counter() - start
        self.pipeline = Pipeline(
            models,
            request.sampling,
            device=device,
            offload=check_offload(options.offload),
            tiled=options.tiling == "true",
            ode=options.ode,
        )
        paths = {name: report.path for name, report in found.reports.items()}
        paths |= {"tokenizer": found.tokenizer} if found.tokenizer else {}
        self.files = {name: fingerprint(path) for name, path in paths.items()}
        self.environment = environment()

    def all(self, shots: list[Shot]) -> None:
        """Make every shot, then say how long each stage took."""
        for shot in shots:
            self._make(shot)
        self._show_seconds(sum(len(shot.outputs) for shot in shots))

    def _make(self, shot: Shot) -> None:
        pictures = {name: prepare(pixels, shot.size) for name, pixels in shot.pictures().items()}
        clip = Clip(
            prompts=[shot.prompt],
            negative=shot.negative_prompt,
            size=shot.size,
            frames=self.request.frames,
            **pictures,
        )
        with _progress(self.console, shot.prompt) as on_progress:
            watch = Watch(self.pipeline.device, on_progress)
            encoded = self.pipeline.encode(clip, watch)
            shared = dict(watch.seconds)
            for seed, path in shot.outputs:
                watch.seconds = dict(shared)
                latents = self.pipeline.denoise(encoded, [seed], watch)
                frames = self.pipeline.decode(latents, watch)[0]
                self._write(shot, seed, path, frames, watch)
                self.pipeline.residence.release()
                for name in ("denoise", "decode", "write"):
                    self.seconds[name] += watch.seconds[name]
        for name, spent in shared.items():
            self.seconds[name] += spent

    def _write(self, shot: Shot, seed: int, path: Path, frames: torch.Tensor, watch: Watch) -> None:
        with watch.stage("write"):
            pixels = to_uint8(frames)
            if len(pixels) == 1:
                write_picture(path, pixels)
            else:
                write_video(path, pixels, fps=self.request.sampling.fps, crf=self.options.crf)
        write_json(path.with_suffix(".json"), self._record(shot, seed, path, watch.seconds))
        Console().print(str(path), soft_wrap=True, highlight=False, markup=False)

    def _record(self, shot: Shot, seed: int, path: Path, seconds: dict[str, float]) -> dict[str, object]:
        """The JSON: the command that makes this file alone, what it resolved to, and what made it."""
        sampling = self.request.sampling
        options = replace(
            self.options,
            prompt=shot.prompt,
            prompt_file=None,
            negative_prompt=shot.negative_prompt,
            image=shot.image and str(shot.image),
            last_image=shot.last_image and str(shot.last_image),
            size=str(shot.size),
            adaptive=False,
            seed=seed,
            num_samples=1,
            out=str(path),
        )
        return {
            "command": command(absolute(options)),
            "options": asdict(options),
            "variant": self.found.variant.name,
            "sampling": asdict(sampling),
            "times": self.pipeline.times.tolist(),
            "files": self.files,
            "environment": self.environment,
            "seconds": {name: round(spent, 3) for name, spent in seconds.items()},
            "loading_seconds": round(self.seconds["loading"], 3),
        }

    def _show_seconds(self, clips: int) -> None:
        table = Table(title=f"seconds, {clips} file{'s' * (clips != 1)}", title_justify="left")
        table.add_column("stage")
        table.add_column("total", justify="right")
        table.add_column("each", justify="right")
        for name, spent in self.seconds.items():
            each = "" if name == "loading" else f"{spent / clips:.2f}"
            table.add_row(name, f"{spent:.2f}", each, end_section=name == "loading")
        total = sum(spent for name, spent in self.seconds.items() if name != "loading")
        table.add_section()
        table.add_row("all but loading", f"{total:.2f}", f"{total / clips:.2f}")
        self.console.print(table)


def _settle(
    options: Options, found: Found, request: Request, plan: Plan, device: torch.device, dtype: torch.dtype
) -> Options:
    """The options with every "auto" and every default that was used written out."""
    sampling = request.sampling
    names = ("steps", "shift", "sigma_max", "boundary", "frames", "fps", "sampler")
    return replace(
        options,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        tiling=str(plan.tiled).lower(),
        attention=found.attention["name"],
        **{name: found.attention.get(name) for name in ("ratio", "block_q", "block_k")},
        **{name: getattr(sampling, name) for name in names},
    )


def _unfinished(console: Console, request: Request, *, is_resumed: bool) -> list[Shot]:
    """The shots with the files still to make: all of them, or of a prompt file those that do not exist."""
    if not is_resumed:
        return list(request.shots)

    def is_made(path: Path) -> bool:
        return path.exists() and path.with_suffix(".json").exists()  # the JSON comes last

    shots = [
        replace(shot, outputs=tuple((seed, path) for seed, path in shot.outputs if not is_made(path)))
        for shot in request.shots
    ]
    before, after = (sum(len(shot.outputs) for shot in part) for part in (request.shots, shots))
    if before > after:
        console.print(f"{before - after} of {before} files exist and are kept; delete one to make it again")
    return [shot for shot in shots if shot.outputs]


def _show_plan(console: Console, plan: Plan, title: str) -> None:
    table = Table(title=f"memory plan: {title}", title_justify="left")
    table.add_column("model")
    table.add_column("weights", justify="right")
    table.add_column("at work", justify="right")
    for stage in plan.stages:
        table.add_row(stage.name, readable(stage.weights), readable(stage.activations))
    console.print(table)
    console.print(plan.verdict() + (" The VAE works in tiles." if plan.tiled else ""))


@contextmanager
def _notes(console: Console) -> Iterator[None]:
    """Warnings as one line each."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        console.print(f"note: {message}", style="yellow", markup=False, highlight=False)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


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
