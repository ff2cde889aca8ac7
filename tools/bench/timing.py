"""How kernels are timed: on a GPU, once they are right, in turns, by CUDA events around a few calls.

A row is the median, the smallest and largest time, then the floor: work at the pace of an H200, and bytes at
what it copies.  Peaks are of memory, over what was taken before.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels.selftest import error_share, poisoned
from tools.options import parse
from turbodiffusion.cli import one_sentence
from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.memory import GIB

# operations a second, in bf16 and in 8 bits, and bytes
BF16_RATE, INT8_RATE, BANDWIDTH = 790e12, 1580e12, 4.3e12


@dataclass
class Timing:
    """Options of every benchmark: calls between two events, pairs of events, and calls that must be right."""

    repeats: int = 5
    calls: int = 5
    trials: int = 1


@dataclass(frozen=True)
class Run:
    """What to time, and the least it has to do: operations, of which so many a second, and bytes to move.

    share: of the error that is allowed, in what the call gives.  targets: how many times as fast as other
    runs it ought to be.
    """

    call: Callable[[], object]
    work: float = 0
    moved: float = 0
    rate: float = BF16_RATE
    share: Callable[[object], float] | None = None
    targets: dict[str, float] = field(default_factory=dict)


# titles and what is timed below them, where there is none more of the one before
Tables = Iterator[tuple[str, dict[str, Run]]]


def share_of(truth: Sequence[Tensor], allowed: float) -> Callable[[object], float]:
    """A Run's share: of that error relative to the truth."""
    return lambda got: error_share((got,) if isinstance(got, Tensor) else got, truth, allowed)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fastest attention on this kind of GPU, (B, N, L, D) each."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v)


def sizes(words: str) -> list[tuple[int, ...]]:
    """From 832x480,1280x720."""
    return [tuple(map(int, word.split("x"))) for word in words.split(",")]


def start(kind: type[Timing], tables: Callable[[Timing], Tables]) -> None:
    """Parse the command line and time the tables that it asks for, on a GPU, without gradients."""
    with one_sentence(), torch.no_grad():
        options, console = parse(kind, sys.argv[1:]), Console(width=150)
        if not torch.cuda.is_available():
            raise UserError("this times a GPU and there is none here; the tests in tests/kernels run without")
        said = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options}"
        console.print(said, markup=False, highlight=False)
        for title, runs in tables(options):
            if title:
                console.print(title)
            compare(runs, options, console)
            del runs  # or the next table would have to find room beside it


def compare(runs: dict[str, Run], timing: Timing, console: Console) -> None:
    """Try the runs, time in turns those that are right, and print; the first is what others are beside."""
    runs = {name: run for name, run in runs.items() if _is_right(name, run, timing.trials, console)}
    spent: dict[str, list[float]] = {name: [] for name in runs}
    peaks = {}
    for turn in range(timing.repeats + 1):
        for name, run in runs.items():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            ms = _milliseconds(run.call, timing.calls)
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / GIB
            if turn:
                spent[name].append(ms)
    medians = {name: statistics.median(times) for name, times in spent.items()}
    for name, run in runs.items():
        ms, said = medians[name], []
        if floor := 1e3 * (run.work / run.rate + run.moved / BANDWIDTH):
            pace = f"{run.work / ms / 1e9:.0f} TFLOP/s" if run.work else f"{run.moved / ms / 1e9:.2f} TB/s"
            said = [f"{pace}, floor {floor:.3f} ms, {floor / ms:.0%} of it reached"]
        for other in {next(iter(runs)): None} | run.targets:
            if other in medians and other != name:
                wanted = f", of {run.targets[other]} wanted" if other in run.targets else ""
                said.append(f"{medians[other] / ms:.2f} x {other}{wanted}")
        spread = f"{min(spent[name]):.3f} to {max(spent[name]):.3f}"
        row = ", ".join([f"  {name}: {ms:.3f} ms ({spread})", *said, f"peak {peaks[name]:.2f} GiB"])
        console.print(row, markup=False, highlight=False)


def _milliseconds(call: Callable[[], object], calls: int) -> float:
    """Of a call; of several, launching the first is hidden behind running the others."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def _is_right(name: str, run: Run, trials: int, console: Console) -> bool:
    """Whether a run may be timed, each of its calls near enough to the truth; says so, and why not."""
    if run.share is None:
        return True
    shares, seconds = [], []
    try:
        for _ in range(trials):
            began = time.perf_counter()
            with poisoned():
                got = run.call()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            shares.append(run.share(got))
    except Exception as error:  # compiler, driver and launcher each raise their own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        console.print(f"  {name}: does not run: {reason[:120]}", markup=False)
        return False
    wrong = [share for share in shares if not share <= 1]
    said = f"first call {seconds[0]:.1f} s, error {max(wrong or shares):.2f} of the allowed"
    console.print(f"  {name}: {said}{': WRONG, so not timed' if wrong else ''}", markup=False)
    return not wrong
