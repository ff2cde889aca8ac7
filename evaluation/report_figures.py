"""The plots of report.html, as inline SVG: radar, bars, published rows, quality against latency."""

import base64
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evaluation.vbench import DIMENSIONS, GROUPS, PUBLISHED, T2V, board_of

if TYPE_CHECKING:  # of the extra `eval`
    from matplotlib.figure import Figure

TOTALS = ("quality", "semantic", "total")  # of published rows
Estimates = Mapping[str, Mapping[str, "Estimate"]]


@dataclass(frozen=True)
class Estimate:
    """A score and the ends of its interval; None of a single prompt."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        between = "" if self.low is None else f" [{self.low:.4f}, {self.high:.4f}]"
        return f"{self.value:.4f}{between}"

    def normalised(self, name: str) -> "Estimate":
        """On the leaderboard's scale, where it has one."""
        if name not in DIMENSIONS:
            return self
        ends = (None if end is None else DIMENSIONS[name].normalise(end) for end in (self.low, self.high))
        return Estimate(DIMENSIONS[name].normalise(self.value), *ends)


def figures(runs: Estimates, seconds: Mapping[str, float | None]) -> list[str]:
    """The plots that there are numbers for, as HTML; a sentence instead where there is no matplotlib."""
    try:
        from matplotlib import colormaps, cycler, rc_context
    except ImportError:
        return ["<p>Plots need matplotlib: pip install 'turbodiffusion[eval]'.</p>"]
    colors = cycler(color=colormaps["tab10" if len(runs) <= 10 else "tab20"].colors)
    with rc_context({"axes.prop_cycle": colors, "svg.hashsalt": "report"}):  # equal runs give equal files
        return list(_figures(runs, seconds))


def _figures(runs: Estimates, seconds: Mapping[str, float | None]) -> Iterator[str]:
    shares = {
        run: {name: score.normalised(name) for name, score in found.items() if _is_share(name, score)}
        for run, found in runs.items()
    }
    names = list(dict.fromkeys(name for found in shares.values() for name in found))
    if len(names) > 2:
        yield radar(shares, names)
    if names:
        yield bars(shares, names, "normalised as on VBench's leaderboard where it has the dimension")
    totals = {
        run: {name: found[name] for name in TOTALS if name in found and board_of(found) is T2V}
        for run, found in runs.items()
    }
    if any(totals.values()):
        yield published(totals)
    everywhere = [
        name for name in ("total", "quality", *names) if all(name in each for each in runs.values())
    ]
    if everywhere and len(runs) > 1 and any(seconds.values()):
        yield latency({run: found[everywhere[0]] for run, found in runs.items()}, seconds, everywhere[0])


def radar(runs: Estimates, names: list[str]) -> str:
    """A polygon a run, a dimension an axis."""
    angles = [2 * math.pi * i / len(names) for i in range(len(names))]
    figure = _figure(6.4, 5.2)
    axes = figure.add_subplot(projection="polar", theta_offset=math.pi / 2, theta_direction=-1)
    for run, found in runs.items():
        values = [found[name].value if name in found else math.nan for name in names]
        (line,) = axes.plot([*angles, angles[0]], [*values, values[0]], marker="o", markersize=3, label=run)
        if len(runs) < 4:
            axes.fill(angles, values, color=line.get_color(), alpha=0.1)
    axes.set_xticks(angles, [name.replace("_", "\n") for name in names], fontsize=8)
    axes.tick_params(axis="x", pad=12)
    axes.set_ylim(0, 1)
    axes.set_rlabel_position(180 / len(names))  # between two axes
    return _image(figure, legend=len(runs) > 1)


def bars(runs: Estimates, names: list[str], title: str) -> str:
    """A group of bars a dimension, with intervals."""
    figure = _figure(7, 1.2 + 0.3 * len(names) * max(2, len(runs)))
    axes = figure.subplots()
    thick = 0.8 / len(runs)
    for i, (run, found) in enumerate(runs.items()):
        there = [(place, found[name]) for place, name in enumerate(names) if name in found]
        places = [place + (i - (len(runs) - 1) / 2) * thick for place, _ in there]
        axes.barh(places, [score.value for _, score in there], thick, label=run)
        for place, (_, score) in zip(places, there, strict=True):
            if score.low is not None:
                axes.plot((score.low, score.high), (place, place), color="black", linewidth=1)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    return _image(figure, legend=len(runs) > 1)


def published(runs: Estimates) -> str:
    """Totals of runs over published ones, which were made with other prompts, seeds and cards."""
    rows = {
        f"{run} (here)": {name: 100 * each.value for name, each in found.items()}
        for run, found in runs.items()
    }
    rows |= {name: dict(zip(TOTALS, values, strict=True)) for name, values in PUBLISHED.items()}
    figure = _figure(11, 1.2 + 0.28 * len(rows))
    for column, (name, axes) in enumerate(zip(TOTALS, figure.subplots(1, 3, sharey=True), strict=True)):
        values = [row.get(name, 0) for row in rows.values()]
        drawn = axes.barh(range(len(rows)), values, color=["C0"] * len(runs) + ["lightgrey"] * len(PUBLISHED))
        axes.bar_label(drawn, [f"{value:.2f}" if value else "" for value in values], padding=2, fontsize=8)
        axes.set_xlim(min(70, *filter(None, values)) - 5, max(92, *values) + 5)
        axes.set_title(name)
        if column == 0:
            axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
            axes.invert_yaxis()
    figure.supxlabel("grey: published elsewhere; differences below a point are no evidence", fontsize=9)
    return _image(figure)


def latency(scores: Mapping[str, Estimate], seconds: Mapping[str, float | None], name: str) -> str:
    """A score over the seconds that a video took to generate."""
    from matplotlib.ticker import LogLocator

    figure = _figure(6.4, 4 + 0.07 * len(scores))
    axes = figure.subplots()
    for run, score in scores.items():
        if seconds[run]:
            ends = None if score.low is None else [[score.value - score.low], [score.high - score.value]]
            axes.errorbar([seconds[run]], [score.value], yerr=ends, marker="o", capsize=3, label=run)
    axes.set(xscale="log", xlabel="seconds a video, without loading", ylabel=name.replace("_", " "))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    return _image(figure, legend=True)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _image(figure: "Figure", *, legend: bool = False) -> str:
    if legend:
        figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.savefig(buffer := io.BytesIO(), format="svg", metadata={"Date": None})
    return inline("plot", "svg+xml", buffer)


def inline(shows: str, kind: str, content: io.BytesIO) -> str:
    """A picture as HTML."""
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{shows}" src="data:image/{kind};base64,{data}">'


def _is_share(name: str, score: Estimate) -> bool:
    return name in DIMENSIONS or (name not in GROUPS and 0 <= score.value <= 1)
