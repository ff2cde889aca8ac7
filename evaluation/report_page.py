"""report.html of one run or of several: one file that needs nothing else, pictures and plots inside.

Scores with their intervals and plots of them; then each dimension's worst videos, or of several runs those
that lost most to the first, as strips of frames; then what failed, and how everything was made.
"""

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import chain
from operator import itemgetter
from pathlib import Path

from PIL import Image

from evaluation.bootstrap import interval, replicated
from evaluation.metrics import METRICS
from evaluation.records import Record
from evaluation.report import beside
from evaluation.report_figures import Estimate, figures, inline
from evaluation.videos import decode, middle
from turbodiffusion.errors import UserError

SHOWN = 3  # worst videos of a dimension, each of another prompt
FRAMES, HEIGHT = 8, 112  # of a strip, and its pixels
Key = tuple[str, str]  # dimension and video
LISTED = 100  # failures and the like, of each kind
_STYLE = Path(__file__).with_suffix(".css").read_text()


@dataclass(frozen=True)
class Run:
    """What is known of a run.  videos: their folder.  results: what results.json holds beside the scores."""

    name: str
    records: Sequence[Record]
    videos: Path | None = None
    results: Mapping[str, object] = field(default_factory=dict)

    def estimates(self) -> dict[str, Estimate]:
        """Every score that the records give, with its interval."""
        prompts = sorted({record.prompt for record in self.records if record.score is not None})
        if not prompts:
            return {}
        values, drawn = replicated(self.records, prompts)
        ends = {name: interval(drawn[name]) if len(prompts) > 1 else (None, None) for name in values}
        return {name: Estimate(float(value), *ends[name]) for name, value in values.items()}


def page(title: str, runs: Sequence[Run], middle_part: str = "") -> str:
    """The whole file.  middle_part: HTML between scores and plots."""
    estimates = {run.name: run.estimates() for run in runs}
    seconds = {run.name: (run.results.get("generation") or {}).get("seconds") for run in runs}
    plots = "".join(figures(estimates, seconds))
    notes, *others = (_listed(runs, about) for about in beside({}))
    parts = [
        f"<h1>{escape(title)}</h1>",
        *notes,
        "<h2>Scores</h2>",
        _score_table(estimates),
        middle_part,
        f'<div class="plots">{plots}</div>',
        *_worst(runs),
        *chain(*others),
        *_made(runs),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )


def table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """HTML of cells that are text, the first of each row its name."""
    heading = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = []
    for first, *cells in rows:
        line = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f"<tr><th>{escape(first)}</th>{line}</tr>")
    return f'<table class="{kind}"><tr>{heading}</tr>{"".join(lines)}</table>'


def _score_table(estimates: Mapping[str, Mapping[str, Estimate]]) -> str:
    names = dict.fromkeys(name for run in estimates.values() for name in run)
    rows = [[name, *(str(run.get(name, "")) for run in estimates.values())] for name in names]
    head = ["score (95 % by bootstrap over prompts)", *estimates]
    if len(estimates) > len(names):  # the longer side downwards
        head, *rows = zip(head, *rows, strict=True)
    return table(head, rows)


def _worst(runs: Sequence[Run]) -> Iterator[str]:
    """The worst videos of one run; of several, those that lost most against the first."""
    first, *others = runs
    for run in others or [first]:
        before = _values(first) if others else {}
        shown = [first, run] if others else [run]
        yield f"<h2>{escape(f'{run.name}: lost most' if others else 'Worst videos')}</h2>"
        for dimension, worst in _ranked(run, before if others else None).items():
            cases = "".join(_case(record, shown, before) for record in worst)
            yield f"<h3>{escape(dimension)}</h3>{cases}"


def _values(run: Run) -> dict[Key, float]:
    scored = ((record, record.score) for record in run.records if record.score is not None)
    return {(record.dimension, record.video): score.value for record, score in scored if score.units}


def _ranked(run: Run, before: Mapping[Key, float] | None) -> dict[str, list[Record]]:
    """The worst videos by dimension, each of another prompt; with `before`, only what is worse than there."""
    worst: dict[str, dict[str, tuple[float, Record]]] = {}
    values = _values(run)
    for record in run.records:
        key = record.dimension, record.video
        if key in values and (before is None or key in before):
            sign = 1 if getattr(METRICS.get(record.dimension), "higher_is_better", True) else -1
            gain = sign * (values[key] - (before[key] if before else 0))
            prompts = worst.setdefault(record.dimension, {})
            if (before is None or gain < 0) and gain < prompts.get(record.prompt, (math.inf,))[0]:
                prompts[record.prompt] = gain, record
    ranked = {name: sorted(prompts.values(), key=itemgetter(0)) for name, prompts in worst.items()}
    return {name: [record for _, record in each[:SHOWN]] for name, each in ranked.items() if each}


def _case(record: Record, runs: Sequence[Run], before: Mapping[Key, float]) -> str:
    said = f"{record.score.value:.4f}"
    if (key := (record.dimension, record.video)) in before:
        said = f"{before[key]:.4f} to {said}; {' above '.join(run.name for run in runs)}"
    strips = "".join(strip(run.videos / record.video) for run in runs if run.videos is not None)
    caption = f"<figcaption>{escape(record.video)} <small>{escape(said)}</small></figcaption>"
    return f"<figure>{caption}{strips}</figure>"


def strip(path: Path) -> str:
    """Frames of a video side by side, as an inline JPEG; a sentence where it can not be read."""
    try:
        pixels, _ = decode(path)
    except UserError as error:
        return f'<p class="quiet">{escape(path.name)} {escape(str(error))}</p>'
    chosen = pixels[middle(len(pixels), min(FRAMES, len(pixels)))]
    frames, height, width, _ = chosen.shape
    wide = Image.fromarray(chosen.transpose(0, 1).reshape(height, frames * width, 3).numpy())
    small = wide.resize((max(1, round(wide.width * HEIGHT / height)), HEIGHT), Image.Resampling.LANCZOS)
    small.save(buffer := io.BytesIO(), "JPEG", quality=80)
    return f"{inline('frames', 'jpeg', buffer)}<br>"


def _listed(runs: Sequence[Run], about: str) -> Iterator[str]:
    """What the results tell under a heading, with the runs that have it where not all do."""
    having: dict[str, list[str]] = {}
    for run in runs:
        for entry in beside(run.results)[about]:
            having.setdefault(entry, []).append(run.name)
    if having:
        entries = [e if len(at) == len(runs) else f"{', '.join(at)}: {e}" for e, at in having.items()]
        more = [f"and {len(entries) - LISTED} more"] * (len(entries) > LISTED)
        items = "".join(f"<li>{escape(entry)}</li>" for entry in entries[:LISTED] + more)
        yield f"<h2>{escape(about)}</h2><ul>{items}</ul>"


def _made(runs: Sequence[Run]) -> Iterator[str]:
    """How videos and scores came about."""
    told: list[dict[str, object]] = []
    for run in runs:
        generation = run.results.get("generation") or {}
        options = generation.get("options", {}) | {"seconds a video": generation.get("seconds")}
        scored = {"prompt file, sha256": run.results.get("prompts_sha256")}
        told.append(options | scored | dict(run.results.get("environment") or {}))
    names = dict.fromkeys(name for each in told for name, value in each.items() if value is not None)
    if names:
        yield "<h2>How it was made</h2>"
        rows = [[name, *(str(each.get(name, "")) for each in told)] for name in names]
        yield table(["", *(run.name for run in runs)], rows, "wrap")


def read_run(folder: Path, name: str, records: Sequence[Record]) -> Run:
    """A run of `python -m evaluation` from its files; what is not there is left out of the page."""
    content: list[dict] = []
    for file in ("results.json", "run.json"):
        path = folder / file
        content.append(json.loads(path.read_text()) if path.is_file() else {})
    results, made = content
    videos = made.get("videos")
    extra = {"environment": made.get("environment")}
    return Run(name, records, videos and Path(videos), results | extra)
