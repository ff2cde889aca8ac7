"""Scores videos: each decoded once for all that is asked of it, on any number of processes, resumably."""

import math
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import distributed

from evaluation.metrics import VideoMetric
from evaluation.records import Record, Score, Sink, key_of, read_records, stamp
from evaluation.vbench import DIMENSIONS
from evaluation.videos import Footage, Video, load
from turbodiffusion.errors import UserError

_LOG = "scored-*.jsonl"  # one for every rank, kept: what is in one is not scored again


@dataclass(frozen=True)
class Task:
    """A video and the metrics that are to look at it, by the key of the record that comes of it."""

    video: Video
    metrics: Mapping[str, VideoMetric]


def plan(videos: Sequence[Video], metrics: Mapping[str, VideoMetric]) -> list[Task]:
    """A task for every video; VBench's dimensions look only at videos whose prompt is theirs."""

    def looks(name: str, video: Video) -> bool:
        theirs = video.prompt.dimensions
        return theirs is None or name not in DIMENSIONS or name in theirs

    return [
        Task(video, {_key(video, each): each for name, each in metrics.items() if looks(name, video)})
        for video in videos
    ]


def _key(video: Video, metric: VideoMetric) -> str:
    files = (video.path, video.reference) if metric.needs_reference else (video.path,)
    prompt, stats = video.prompt, [stamp(file) for file in files if file and file.exists()]
    return key_of(metric.name, metric.version, stats, prompt.text, prompt.auxiliary.get(metric.name))


def score_all(
    tasks: Sequence[Task], folder: Path, device: torch.device, *, rank: int = 0, world: int = 1
) -> None:
    """Score this rank's share of the tasks into the folder, less what is known; failures are tried again."""
    sink = Sink(folder / _LOG.replace("*", str(rank)))
    known = {key for key, record in read_records(folder.glob(_LOG)).items() if record.score is not None}
    shares = [
        Task(task.video, {key: each for key, each in task.metrics.items() if key not in known})
        for task in tasks[rank::world]
    ]
    todo = [task for task in shares if task.metrics]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    failed = 0
    with Progress(*columns, console=Console(stderr=True), disable=rank > 0) as progress:
        bar = progress.add_task("scoring", total=len(shares), completed=len(shares) - len(todo))
        for task, footage in _decoded(todo, device):
            records = [_record(key, metric, task.video, footage) for key, metric in task.metrics.items()]
            sink.add(records)
            failed += any(record.failed is not None for record in records)
            said = f"scoring, {failed} failed" if failed else "scoring"
            progress.update(bar, advance=1, description=said)
    sink.close()


def collect(tasks: Sequence[Task], folder: Path) -> list[Record]:
    """The records of all tasks, in their order, whoever wrote them."""
    found = read_records(folder.glob(_LOG))
    return [found[key] for task in tasks for key in task.metrics]


def wait_for_all(world: int) -> None:
    """Return once every rank has come here."""
    if world > 1:
        if not distributed.is_initialized():
            # shares end days apart at worst; a rank that dies is torchrun's to notice
            distributed.init_process_group("gloo", timeout=timedelta(days=30))
        distributed.barrier()


def _decoded(tasks: Sequence[Task], device: torch.device) -> Iterator[tuple[Task, Future[Footage]]]:
    """Tasks with their videos, the next of which is decoded meanwhile."""
    with ThreadPoolExecutor(1) as reader:
        ahead: deque[tuple[Task, Future[Footage]]] = deque()
        for task in tasks:
            ahead.append((task, reader.submit(load, task.video, device)))
            if len(ahead) > 1:
                yield ahead.popleft()
        yield from ahead


def _record(key: str, metric: VideoMetric, video: Video, footage: Future[Footage]) -> Record:
    score, failed = None, None
    try:
        with torch.no_grad():
            score = _score(metric, footage.result())
    except UserError as error:
        failed = str(error)
    except Exception:  # one video must not end a run; the report shows it and the exit code tells
        failed = traceback.format_exc().strip()
    return Record(key, metric.name, video.name, video.prompt.name, score, failed)


def _score(metric: VideoMetric, footage: Footage) -> Score:
    if (frames := len(footage.pixels)) < metric.least_frames:
        raise UserError(f"has {frames} frame{'s' * (frames != 1)}; {metric.name} needs {metric.least_frames}")
    score = metric.score(footage)
    if not math.isfinite(score.total):
        raise UserError(f"scored {score.total}")
    return score
