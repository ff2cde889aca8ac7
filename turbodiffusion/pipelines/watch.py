"""How long each stage of a generation takes, and how far it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch

OnProgress = Callable[[str, int, int], None]  # stage, done, of


@dataclass
class Watch:
    """Seconds spent in each stage, and the caller's progress hook."""

    device: torch.device
    on_progress: OnProgress | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, total: int = 1) -> Iterator[Callable[[int], None]]:
        """Time the block, less the stages within it; the block may report how much of the total is done."""
        self._wait()
        start, others = perf_counter(), sum(self.seconds.values())

        def report(done: int) -> None:
            if self.on_progress is not None:
                self.on_progress(name, done, total)

        report(0)
        yield report
        self._wait()
        spent = perf_counter() - start - (sum(self.seconds.values()) - others)
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        report(total)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def in_step(report: Callable[[int], None], device: torch.device) -> Callable[[int], None]:
    """The report of steps that are finished, called after each is queued: a GPU runs one behind.

    It waits for the step before, so that progress is true and the queue short, but the GPU never waits.
    """
    if device.type != "cuda":
        return report
    queued: list[torch.cuda.Event] = []

    def after(step: int) -> None:
        queued.append(torch.cuda.current_stream(device).record_event())
        if len(queued) > 1:
            queued.pop(0).synchronize()
            report(step - 1)

    return after
