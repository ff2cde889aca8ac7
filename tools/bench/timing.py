"""How kernels are timed here: on a GPU, in turns, by CUDA events."""

from collections.abc import Callable

import torch
from rich.console import Console

from turbodiffusion.errors import UserError

BANDWIDTH = 4.3e12  # bytes a second that an H200 copies


def gpu_console(said: str) -> Console:
    """Where to print, begun with the card and what is timed; UserError without a card."""
    if not torch.cuda.is_available():
        raise UserError("this times a GPU and there is none here; the tests in tests/kernels run without")
    console = Console(width=130)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {said}")
    return console


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every run, `repeats` times in turns after one of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, fn in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            fn()
            end.record()
            end.synchronize()
            if turn:
                times[name].append(start.elapsed_time(end))
    return times


def repeated(fn: Callable[[], object], calls: int) -> None:
    """Several calls, so that launching the first is hidden behind running the others."""
    for _ in range(calls):
        fn()
