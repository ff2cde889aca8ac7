"""Draw what evaluation/students.py measured, tables together: a score over sparsity, steps or seconds.

    python -m evaluation.plot tables=[A/students.json,B/students.json] dst=PNG [x=sparsity|steps|seconds]
                              [score=NAME]

Rows of one model are a line, with standard deviations of its training seeds; each table's first row, its
teacher, is a dashed level, and over seconds a model like others.  Needs matplotlib, of the extra `eval`.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from omegaconf import MISSING

from evaluation.command import run
from evaluation.students import COLUMNS
from turbodiffusion.checkpoints.files import appearing
from turbodiffusion.errors import UserError

AXES = {
    "sparsity": ("share of key blocks left out, %", 100),
    "steps": ("steps", 1),
    "seconds": ("seconds of denoising a clip", 1),
}
Point = tuple[float, float, float]  # x, mean and deviation of the score


@dataclass
class Options:
    """The command line."""

    tables: list[str] = MISSING
    dst: str = MISSING
    x: str = "sparsity"
    score: str = "all_three"


def read(table: str) -> list[dict]:
    """The rows of a table; UserError where it is none."""
    try:
        return json.loads(Path(table).expanduser().read_text())["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{table} is no students.json of evaluation.students: {error}") from error


def points(rows: list[dict], options: Options) -> dict[str, list[Point]]:
    """The line of every model, from left to right."""
    lines, (_, factor) = defaultdict(list), AXES[options.x]
    _, unit, _ = COLUMNS[options.score]
    for row in rows:
        values = [unit * run[options.score] for run in row["runs"]]
        error = stdev(values) if len(values) > 1 else 0.0
        x = row[options.x] if options.x in row else mean(run[options.x] for run in row["runs"])
        lines[row["model"]].append((factor * x, mean(values), error))
    return {model: sorted(line) for model, line in lines.items()}


def draw(options: Options) -> None:
    """Write the plot; whatever is wrong is refused before."""
    for name, choices in (("x", AXES), ("score", COLUMNS)):
        if (got := getattr(options, name)) not in choices:
            raise UserError(f"{name}={got}: choose {', '.join(choices)}")
    tables = [read(table) for table in options.tables]
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'turbodiffusion[eval]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    levels = {mean(run[options.score] for run in rows[0]["runs"]) for rows in tables}
    heading, unit, _ = COLUMNS[options.score]
    for level in levels:
        axes.axhline(unit * level, color="grey", linestyle="--", label="teacher, in full")
    unjudged = ("teacher, other noise",) if options.x == "seconds" else ("teacher", "teacher, other noise")
    judged = [row for rows in tables for row in rows if row["model"] not in unjudged]
    for model, line in points(judged, options).items():
        x, y, error = zip(*line, strict=True)
        axes.errorbar(x, y, yerr=error, marker="o", capsize=3, label=model)
    axes.set(xlabel=AXES[options.x][0], ylabel=heading)
    if options.x == "seconds":
        axes.set_xscale("log")
    elif options.x == "steps":
        axes.set_xticks(sorted({row["steps"] for row in judged}))
    axes.grid(alpha=0.3)
    axes.legend()
    with appearing(Path(options.dst).expanduser()) as part:
        figure.savefig(part, format=Path(options.dst).suffix.removeprefix(".") or "png", dpi=120)


if __name__ == "__main__":
    run(Options, draw)
