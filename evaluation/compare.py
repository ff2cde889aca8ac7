"""Runs of `python -m evaluation` beside the first of them, on the videos that both scored.

    python -m evaluation.compare runs=[teacher,student,...] [out=DIR]

A run may also be a result JSON of upstream's `vbench evaluate`, or a zip of them.  Differences are paired:
prompts are drawn with replacement 2000 times, the same for both, and the middle 95 % of the differences are
shown.  Values are raw scores; VBench's quality, semantic and total appear where complete.  DIR gets
compare.json, compare.md and report.html.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from evaluation.bootstrap import interval, replicated
from evaluation.command import heading, line, run, write
from evaluation.export import read_upstream
from evaluation.records import Record, read_records
from evaluation.report_page import page, read_run, table
from evaluation.vbench import GROUPS
from turbodiffusion.checkpoints.saving import write_json
from turbodiffusion.errors import UserError

HEADINGS = ("run", "score", "first run", "this run", "difference", "95 %", "prompts", "videos")


@dataclass
class Options:
    """The command line."""

    runs: list[str] = field(default_factory=list)
    out: str | None = None


@dataclass(frozen=True)
class Difference:
    """One run less the baseline in one score.  low, high: 95 %; None of a single prompt."""

    run: str
    score: str
    baseline: float
    value: float
    delta: float
    low: float | None
    high: float | None
    prompts: int
    videos: int


def scored(run: Path) -> list[Record]:
    """What a run scored."""
    if run.suffix in (".json", ".zip"):
        return read_upstream(run)
    path = run / "records.jsonl"
    if not path.is_file():
        raise UserError(f"{run} is no finished run of python -m evaluation: it has no records.jsonl")
    return [record for record in read_records([path]).values() if record.score is not None]


def compare(baseline: Iterable[Record], other: Iterable[Record], run: str = "") -> list[Difference]:
    """Differences in every score that both have, over the videos that both scored."""
    one, two = ({(r.dimension, r.video): r for r in records} for records in (baseline, other))
    shared = [key for key in one if key in two]
    if differ := [
        video for dimension, video in shared if one[dimension, video].prompt != two[dimension, video].prompt
    ]:
        raise UserError(f"the runs do not agree on what {differ[0]} was asked to show")
    if not shared:
        raise UserError(f"{run} has no video and dimension in common with the first run")
    prompts = sorted({one[key].prompt for key in shared})
    sides = [replicated((side[key] for key in shared), prompts) for side in (one, two)]
    points, replicates = zip(*sides, strict=True)
    found = []
    for name in points[0]:
        first, second = (float(point[name]) for point in points)
        asked = {one[key].prompt: None for key in shared if key[0] == name} or prompts
        low, high = interval(replicates[1][name] - replicates[0][name]) if len(asked) > 1 else (None, None)
        videos = len({key[1] for key in shared if name in (key[0], *GROUPS)})
        found.append(Difference(run, name, first, second, second - first, low, high, len(asked), videos))
    return found


def cells(each: Difference) -> list[str]:
    """A line of the table."""
    between = "n/a" if each.low is None else f"{each.low:+.4f} to {each.high:+.4f}"
    numbers = f"{each.baseline:.4f}", f"{each.value:.4f}", f"{each.delta:+.4f}", between
    return [each.run, each.score, *numbers, str(each.prompts), str(each.videos)]


def report(options: Options) -> None:
    """Print and, if wanted, write the table."""
    if len(options.runs) < 2:
        raise UserError(f"runs=[first,other,...] compares two runs or more, got {len(options.runs)}")
    paths = [Path(run).expanduser() for run in options.runs]
    short = len({path.name for path in paths}) == len(paths)
    first, *others = [(path.name if short else str(path), scored(path)) for path in paths]
    differences = [each for name, records in others for each in compare(first[1], records, name)]
    rows = [cells(each) for each in differences]
    made = [*heading(HEADINGS, texts=2), *map(line, rows)]
    Console().print("\n".join(made), markup=False, soft_wrap=True)
    if options.out is not None:
        folder = Path(options.out).expanduser()
        runs = [read_run(path, *named) for path, named in zip(paths, (first, *others), strict=True)]
        html = page(folder.name, runs, f"<h2>Differences</h2>{table(HEADINGS, rows)}")
        content = {"first_run": first[0], "differences": [asdict(each) for each in differences]}
        write_json(folder / "compare.json", content)
        write(folder, {"compare.md": "\n".join(made) + "\n", "report.html": html})


if __name__ == "__main__":
    run(Options, report)
