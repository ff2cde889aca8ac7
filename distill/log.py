"""What a run says while it trains: a JSONL file, pictures and a progress line."""

import json
import math
import time
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from distill.preview import save_preview
from distill.replicas import rank
from distill.tracking import Tracker


class Log:
    """Running means on the device, written every `every` steps; the device is waited for only then."""

    def __init__(self, path: Path, every: int, device: torch.device, tracker: Tracker | None = None):
        self.path, self.every, self.device, self.tracker = path, every, device, tracker
        path.parent.mkdir(parents=True, exist_ok=True)
        self.is_silent = rank() > 0
        self.console = Console(quiet=self.is_silent)
        self.progress = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal or self.console.is_dumb_terminal or self.is_silent,
        )
        self.task = self.progress.add_task("train", total=1.0, line="", step=0)
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor | int] = {}
        self.samples, self.since = 0, time.perf_counter()

    def __enter__(self) -> "Log":
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        if self.tracker is not None:
            self.tracker.finish(failed=error is not None)

    def say(self, text: str) -> None:
        """One line to the console, above the progress."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def add(self, name: str, values: Tensor) -> None:
        """Include the mean of values in the next line; no wait for the device."""
        self._add(name, values.detach().float().mean(), 1)

    def watch(self, name: str, values: Tensor, times: Tensor) -> None:
        """The same for one number a sample (B,), apart for each quarter of the times s (B,)."""
        quarter = (4 * times).long().clamp(0, 3)
        for i in range(4):
            chosen = quarter == i
            total = values.detach().float().where(chosen, 0.0).sum()
            self._add(f"{name}/s{i / 4:g}-{(i + 1) / 4:g}", total, chosen.sum())

    def _add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0) + count

    def step(self, step: int, progress: float, samples: int, rate: float) -> None:
        """Close a step; every so often write means, speed and memory."""
        self.samples += samples
        if step % self.every:
            return
        means = {name: (total / self.counts[name]).item() for name, total in self.sums.items()}
        # a quarter of time that no sample fell into has none
        values = {name: mean for name, mean in means.items() if not math.isnan(mean)}
        now = time.perf_counter()
        values |= {"lr": rate, "samples_per_s": self.samples / (now - self.since)}
        if self.device.type not in ("cpu", "mps"):  # these keep no count
            device_module = torch.get_device_module(self.device)
            values["memory_gib"] = device_module.max_memory_allocated(self.device) / 2**30
        self.record(step, values)
        # the quarters of time fill a screen: they are in the file
        shown = {name: value for name, value in values.items() if "/s0" not in name}
        line = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self.progress.update(self.task, completed=progress, step=step, line=line)
        if self.progress.disable:
            self.say(f"step {step}  {progress:.1%}  {line}")
        self.sums, self.counts, self.samples, self.since = {}, {}, 0, now

    def restart_clock(self) -> None:
        """Leave out of the speed what was done since the last line: a checkpoint, a preview."""
        self.samples, self.since = 0, time.perf_counter()

    def record(self, step: int, values: dict[str, float]) -> None:
        """Append one line to the file."""
        if self.is_silent:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.tracker is not None:
            self.tracker.record(step, values)

    def show(self, step: int, clips: Tensor) -> None:
        """Draw clips (rows, columns, 3, F, H, W) as `previews/step-N` beside the file."""
        if self.is_silent:
            return
        path = self.path.parent / "previews" / f"step-{step:07d}"
        save_preview(clips, path)
        if self.tracker is not None:
            self.tracker.show(step, path.with_suffix(".png"))
