"""Commands that run side by side on the GPUs of a machine, each as soon as what it needs is done."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PAUSE = 0.2  # seconds between looks at what runs


@dataclass(frozen=True)
class Job:
    """A command, and the names of the jobs whose files it reads."""

    name: str
    words: tuple[str, ...]
    needs: frozenset[str] = frozenset()


@dataclass
class Queue:
    """Runs jobs, `each` at a time on every GPU, or in all where there is none (gpus=0).

    What a job says goes to logs/NAME.log; one that ended well is noted in logs/NAME.done and not run again as
    long as its command is the same.
    """

    logs: Path
    gpus: int
    each: int
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def run(self, jobs: Mapping[str, Job]) -> list[str]:
        """Run them all -> a sentence for each that failed or could not start.

        Ctrl-C is passed on to what runs, waited for, and raised; a second one kills.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        done = {name for name, job in jobs.items() if self._is_done(job)}
        waiting = [job for name, job in jobs.items() if name not in done]
        running: dict[str, tuple[subprocess.Popen, int, float]] = {}
        failed: dict[str, str] = {}
        free = [gpu for _ in range(self.each) for gpu in range(max(self.gpus, 1))]
        with self._progress(len(jobs)) as progress, self._stopping(running):
            while waiting or running:
                for name in [name for name, (process, *_) in running.items() if process.poll() is not None]:
                    process, gpu, started = running.pop(name)
                    free.append(gpu)
                    self._settle(jobs[name], process.returncode, time.time() - started, done, failed)
                for job in list(waiting):
                    if lost := job.needs & failed.keys():
                        failed[job.name] = f"{job.name} lacks {', '.join(sorted(lost))}"
                        waiting.remove(job)
                    elif free and job.needs <= done:
                        busy = [gpu for _, gpu, _ in running.values()]
                        gpu = min(free, key=busy.count)
                        free.remove(gpu)
                        waiting.remove(job)
                        running[job.name] = self._start(job, gpu), gpu, time.time()
                progress.update(
                    progress.task_ids[0], completed=len(done) + len(failed), running=" ".join(running)
                )
                time.sleep(PAUSE)
        return list(failed.values())

    def _is_done(self, job: Job) -> bool:
        note = self.logs / f"{job.name}.done"
        return note.exists() and note.read_text() == "\n".join(job.words)

    def _start(self, job: Job, gpu: int) -> subprocess.Popen:
        where = {"CUDA_VISIBLE_DEVICES": str(gpu)} if self.gpus else {}
        with (self.logs / f"{job.name}.log").open("w") as log:
            # a session of its own: Ctrl-C reaches it once, from here
            return subprocess.Popen(
                job.words, stdout=log, stderr=log, env=os.environ | where, start_new_session=True
            )

    def _settle(self, job: Job, code: int, seconds: float, done: set[str], failed: dict[str, str]) -> None:
        if code == 0:
            done.add(job.name)
            (self.logs / f"{job.name}.done").write_text("\n".join(job.words))
            self.console.print(f"{job.name}: done in {seconds:.0f} s", markup=False)
            return
        log = self.logs / f"{job.name}.log"
        said = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        failed[job.name] = f"{job.name} ended with {code}: {said[:200]} ({log})"
        self.console.print(failed[job.name], markup=False)

    def _progress(self, total: int) -> Progress:
        columns = TextColumn("jobs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        progress = Progress(*columns, TextColumn("{task.fields[running]}"), console=self.console)
        progress.add_task("jobs", total=total, running="")
        return progress

    @contextmanager
    def _stopping(self, running: Mapping[str, tuple[subprocess.Popen, int, float]]) -> Iterator[None]:
        try:
            yield
        except BaseException:
            processes = [process for process, *_ in running.values()]
            for process in processes:
                process.send_signal(signal.SIGINT)
            try:
                for process in processes:
                    process.wait()
            except KeyboardInterrupt:
                for process in processes:
                    process.kill()
            raise
