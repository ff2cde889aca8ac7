"""Say what a checkpoint is and why: python -m tools.inspect ckpt=FILE_OR_FOLDER [variant=NAME] [kind=vae]."""

import json
from dataclasses import asdict, dataclass
from functools import partial

from rich.console import Console
from rich.table import Table

from tools.convert import Kind
from tools.options import MISSING, run
from turbodiffusion.attention import spoken
from turbodiffusion.checkpoints import Report, detect


@dataclass
class Options:
    """kind: the part of a whole diffusers pipeline."""

    ckpt: str = MISSING
    variant: str | None = None
    kind: Kind = Kind.network


def show(options: Options) -> None:
    """Print what there is: what, tensors by type, and why."""
    report = detect(options.ckpt, kind=options.kind.name, variant=options.variant)
    what = Table("", "", title=str(report.path), show_header=False)
    for name, value in _summary(report).items():
        what.add_row(name, value)
    types = Table("dtype", "tensors", "GB", title="as stored")
    for dtype, (count, size) in sorted(report.dtypes.items(), key=lambda row: -row[1][1]):
        types.add_row(str(dtype).removeprefix("torch."), str(count), f"{size / 1e9:.3f}")
    console = Console()
    console.print(what)
    console.print(types)
    console.print("why:")
    for reason in report.reasons:
        console.print(f"- {reason}", markup=False, highlight=False)


def _summary(report: Report) -> dict[str, str]:
    tensors = sum(count for count, _ in report.dtypes.values())
    rows = {
        "kind": report.kind.replace("_", " "),
        "format": f"{report.format} ({report.layout})",
        "tensors": f"{tensors}, {sum(size for _, size in report.dtypes.values()) / 1e9:.3f} GB",
    }
    if report.kind == "network":
        rows |= {
            "variant": report.variant
            or f"unknown: {' or '.join(report.candidates) or 'none of these sizes'}",
            "expert": report.expert or "-",
            "quantised": _quantised(report),
            "attention": spoken(report.config["attention"]),
        }
    if report.config:
        sizes = {name: value for name, value in report.config.items() if name != "attention"}
        rows["sizes"] = ", ".join(f"{name} {value}" for name, value in sizes.items())
    if report.sampling:
        shown = {k: v for k, v in asdict(report.sampling).items() if k != "negative_prompt" and v is not None}
        rows["sampling"] = ", ".join(f"{name} {value}" for name, value in shown.items())
    for number, deed in enumerate(report.metadata.history if report.metadata else (), 1):
        rows[f"history {number}"] = json.dumps(deed, ensure_ascii=False)
    return rows


def _quantised(report: Report) -> str:
    """The schemes of 8 bits, of how many linear layers, and which have none."""
    if not report.quantised:
        return "no"
    kept = [layer for layer in report.linear if layer not in report.quantised]
    schemes = " and ".join(sorted(set(report.quantised.values())))
    line = f"{schemes}, {len(report.quantised)} of {len(report.linear)} linear layers"
    return line + (f"; not {', '.join(kept)}" if kept else "")


main = partial(run, Options, show)

if __name__ == "__main__":
    main()
