"""What a run found, as results.json holds it and as report.md shows it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from statistics import median

from evaluation.bootstrap import draws, interval, scores, sums
from evaluation.command import heading, line
from evaluation.metrics import VideoMetric
from evaluation.prompts import Suite
from evaluation.records import Record
from evaluation.vbench import DIMENSIONS, board_of
from evaluation.videos import Found, Video

_SHOWN = 20  # missing files that the report lists
MISSING = "Missing"
# what is told of how videos were generated
_TOLD = (
    *("ckpt", "sampler", "steps", "guidance", "shift", "size", "frames", "fps", "crf"),
    *("device", "dtype", "attention", "ratio", "quant"),
)


def summarise(
    metrics: Mapping[str, VideoMetric], records: Sequence[Record], found: Found, suite: Suite | None
) -> dict[str, object]:
    """The content of results.json; nothing in it depends on when or on how many processes it was found."""
    dimensions = {
        name: _dimension(metric, [record for record in records if record.dimension == name])
        for name, metric in metrics.items()
    }
    raw = {name: each["raw"] for name, each in dimensions.items() if each["raw"] is not None}
    failures = [record for record in records if record.failed is not None]
    is_suite = suite is not None and suite.samples is not None
    return {
        "schema": 1,
        "dimensions": dimensions,
        "totals": asdict(board_of(suite.counts()).totals(raw)) if is_suite else None,
        "notes": list(_notes(metrics, failures, found, suite)),
        "failures": [{"video": r.video, "dimension": r.dimension, "reason": r.failed} for r in failures],
        "left_out": found.odd,
        "missing_videos": found.missing,
        "prompts_sha256": None if suite is None else suite.sha256,
        "generation": _generation(found.videos),
    }


def _generation(videos: Sequence[Video]) -> dict[str, object] | None:
    """What the records of infer.py beside videos say: the options that all share, and seconds a video."""
    options, seconds = [], []
    for video in videos:
        # some other file, or none
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            record = json.loads(video.path.with_suffix(".json").read_text())
            seconds.append(sum(record["seconds"].values()))
            options.append({name: record["options"][name] for name in _TOLD})
    if not options:
        return None
    shared = {
        name: value for name, value in options[0].items() if all(value == each[name] for each in options)
    }
    return {"videos": len(options), "seconds": median(seconds), "options": shared}


def _dimension(metric: VideoMetric, records: list[Record]) -> dict[str, object]:
    metric.reset()
    scored = [record for record in records if record.score is not None]
    for record in scored:
        metric.update(record.score)
    raw = float(metric.compute()) if metric.units else None
    vbench = DIMENSIONS.get(metric.name)
    prompts = sorted({record.prompt for record in scored})
    replicates = scores(sums(scored, prompts), draws(len(prompts)))[metric.name] if len(prompts) > 1 else None
    return {
        "raw": raw,
        "normalised": None if raw is None or vbench is None else vbench.normalise(raw),
        "interval": None if replicates is None else interval(replicates),
        "prompts": len(prompts),
        "videos": len(scored),
        "units": int(metric.units),
        "failed": len(records) - len(scored),
    }


def _notes(
    metrics: Mapping[str, VideoMetric], failures: list[Record], found: Found, suite: Suite | None
) -> Iterator[str]:
    """Why these numbers are not the leaderboard's."""
    if suite is None or not suite.is_standard:
        yield "the prompts are not the leaderboard's"
    if found.missing:
        yield f"videos are missing: {len(found.missing)}"
    if failures:
        yield f"videos could not be scored: {len({record.video for record in failures})}"
    if "temporal_flickering" in metrics:
        yield "temporal_flickering looked at all videos, not only at those that a filter found static"


def beside(results: Mapping[str, object]) -> dict[str, list[str]]:
    """What is told beside the scores, by heading; parts of the results may not be there."""
    # what keeps a video from being read it says once for every dimension
    lost = ((each["video"], each["reason"].splitlines()[-1]) for each in results.get("failures", ()))
    left_out = results.get("left_out", {}).items()
    return {
        "Not comparable with the leaderboard, because": results.get("notes", []),
        "Failed": [f"{video} {reason}" for video, reason in dict.fromkeys(lost)],
        "Left out": [f"{name} {reason}" for name, reason in left_out],
        MISSING: results.get("missing_videos", []),
    }


def markdown(results: Mapping[str, object], title: str) -> str:
    """The report."""
    counts = "prompts", "videos", "failed"
    made = [f"# {title}", "", *heading(["dimension", "raw", "95 %", "normalised", *counts])]
    for name, each in results["dimensions"].items():
        between = "n/a" if each["interval"] is None else "{:.4f} to {:.4f}".format(*each["interval"])
        cells = [name, _number(each["raw"]), between, _number(each["normalised"])]
        made.append(line([*cells, *(str(each[count]) for count in counts)]))
    if (totals := results["totals"]) is not None:
        made += ["", *_totals(totals)]
    for about, entries in beside(results).items():
        if about == MISSING:
            entries = entries[:_SHOWN] + ["..."] * (len(entries) > _SHOWN)
        if entries:
            made += ["", f"## {about}", "", *(f"- {entry}" for entry in entries)]
    return "\n".join(made) + "\n"


def _totals(totals: Mapping[str, object]) -> Iterator[str]:
    for group, value in totals["groups"].items():
        yield f"- {group}: {100 * value:.2f}"
    for group, value in totals["partial"].items():
        yield f"- {group}, of the dimensions that are there alone: {100 * value:.2f}"
    if totals["total"] is None:
        yield f"- no total: {', '.join(totals['missing'])} missing"
    else:
        yield f"- total: {100 * totals['total']:.2f}"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"
