"""Convert a checkpoint of any supported format.

    python -m tools.convert src=FILE_OR_FOLDER dst=FILE_OR_FOLDER [format=ours|wan|diffusers|turbodiffusion]
                            [dtype=bfloat16|float16|float32] [variant=NAME] [overwrite=true]

Tensors pass one at a time, so 14B needs no more memory than its largest tensor; a .pth needs one copy.
dst without a suffix is a folder, written in shards.  Without dtype= numbers stay as stored, INT8 becomes
bfloat16.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from tools.options import MISSING, run
from turbodiffusion.attention import spoken
from turbodiffusion.checkpoints.detect import open_checkpoint
from turbodiffusion.checkpoints.export import check_destination, prepare, write
from turbodiffusion.checkpoints.metadata import KINDS, Metadata, Report
from turbodiffusion.checkpoints.sources import Entries, Entry
from turbodiffusion.errors import UserError

Format = Enum("Format", ["ours", "wan", "diffusers", "turbodiffusion"])
Dtype = Enum("Dtype", ["bfloat16", "float16", "float32"])
Kind = Enum("Kind", KINDS)


@dataclass
class Options:
    """kind: the part of a whole diffusers pipeline; ema: a training checkpoint's average, not its weights."""

    src: str = MISSING
    dst: str = MISSING
    format: Format = Format.ours
    dtype: Dtype | None = None
    variant: str | None = None
    kind: Kind = Kind.network
    ema: bool = True
    shard_gb: float = 10.0
    overwrite: bool = False


def convert(options: Options) -> str:
    """Do it, and say in a line what was done."""
    dst = Path(options.dst).expanduser()
    if dst.exists() and not options.overwrite:
        raise UserError(f"{dst} exists; pass overwrite=true to replace it, or another dst=")
    checkpoint = open_checkpoint(
        options.src, kind=options.kind.name, variant=options.variant, ema=options.ema
    )
    report = checkpoint.report
    check_destination(report.kind, dst, options.format.name)
    dtype = options.dtype and getattr(torch, options.dtype.name)
    deed = {"converted": report.path.name, "from": report.format, "dtype": str(dtype or "as stored")}
    entries, metadata = prepare(checkpoint, dtype, deed)
    write_shown(entries, metadata, dst, options.format.name, int(options.shard_gb * 1e9))
    size = sum(entry.nbytes for entry in entries.values()) / 1e9
    line = f"{report.path} ({report.format}) -> {dst} ({options.format.name})"
    line += f": {len(entries)} tensors, {size:.3f} GB"
    return line + unsaid(report) if report.kind == "network" and dst.suffix == ".pth" else line


def unsaid(report: Report) -> str:
    """What a network's .pth can not say, in words, for who writes one."""
    line = ""
    if report.sampling and report.sampling.student:
        line += "; a .pth can not say that it is a student's: keep TurboWan or rcm in its name"
    if (attention := report.config["attention"])["name"] != "dense":
        line += f"; a .pth can not say its attention: {spoken(attention)}"
    return line


def write_shown(
    entries: Entries, metadata: Metadata, dst: Path, format: str, max_shard: int = 10 * 10**9
) -> None:
    """`export.write` behind a progress bar."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("tensors", total=len(entries))
        counted = {name: _counted(entry, lambda: progress.advance(task)) for name, entry in entries.items()}
        write(counted, metadata, dst, format, max_shard)


def _counted(entry: Entry, tick: Callable[[], None]) -> Entry:
    def load() -> Tensor:
        tick()
        return entry.load()

    return replace(entry, load=load)


main = partial(run, Options, convert)

if __name__ == "__main__":
    main()
