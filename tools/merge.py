"""Add what one training changed to another model: base + weight * (diff_target - diff_base).

    python -m tools.merge base=FILE diff_base=FILE diff_target=FILE dst=FILE_OR_FOLDER [weight=1.0]

SLA into a student: base=student, diff_base=its teacher, diff_target=the teacher tuned for SLA.
A student's few steps into another teacher: base=other teacher, diff_base=teacher, diff_target=student.

Each input may be of any supported format.  Tensors pass one at a time; the sum is taken in fp32 and rounded
once, to base's type, so merge fp32 files where there are some: a small difference drowns in bf16.  What base
has alone or in another shape is kept; what only diff_target has is copied.  Where diff_target alone has SLA
attention, the new model has it too, with every projection.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tools.convert import write_shown
from tools.options import MISSING, run
from turbodiffusion.attention import DENSE
from turbodiffusion.checkpoints.detect import Checkpoint, open_kind
from turbodiffusion.checkpoints.export import check_destination, prepare
from turbodiffusion.checkpoints.metadata import Report
from turbodiffusion.checkpoints.sources import Entry
from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.schedule import STUDENT, choose_sampler
from turbodiffusion.variants import variant as named_variant

# what may become of a tensor; the last: it is in both diff files but not in base
MERGED, MISSED, SHAPED, COPIED, LEFT = "merged", "kept (missing)", "kept (shape)", "copied", "left out"


@dataclass
class Options:
    """variant: of base, where its keys can not tell; ema: training checkpoints' averages, not weights."""

    base: str = MISSING
    diff_base: str = MISSING
    diff_target: str = MISSING
    dst: str = MISSING
    weight: float = 1.0
    variant: str | None = None
    ema: bool = True


def merge_entries(
    base: Checkpoint, diff_base: Checkpoint, diff_target: Checkpoint, weight: float
) -> tuple[dict[str, Entry], dict[str, str]]:
    """The new model's tensors, not yet computed, and every name's fate; INT8 becomes bf16."""
    one, minus, plus = (checkpoint.floats(torch.float32) for checkpoint in (base, diff_base, diff_target))
    merged, fate = base.floats(torch.bfloat16), {}
    for name, entry in merged.items():
        if name not in minus or name not in plus:
            fate[name] = MISSED
        elif not entry.shape == minus[name].shape == plus[name].shape:
            fate[name] = SHAPED
        else:
            fate[name] = MERGED
            merged[name] = _moved(entry, (one[name], minus[name], plus[name]), weight)
    fate |= {name: LEFT if name in minus else COPIED for name in plus if name not in merged}
    return merged | {name: plus[name] for name in fate if fate[name] == COPIED}, fate


def _moved(like: Entry, parts: tuple[Entry, Entry, Entry], weight: float) -> Entry:
    def load() -> Tensor:
        base, minus, plus = (part.load().float() for part in parts)
        # in this order the sum is exactly plus where base is minus, and exactly base at weight 0
        return base.sub(minus, alpha=weight).add_(plus, alpha=weight).to(like.dtype)

    return replace(like, load=load)


def merge(options: Options) -> str:
    """Do it, and say what was done."""
    dst = Path(options.dst).expanduser()
    check_destination("network", dst, "ours")
    if dst.exists():
        raise UserError(f"{dst} exists and may be what is merged; nothing is replaced, give another dst=")
    if not math.isfinite(options.weight):
        raise UserError(f"weight={options.weight} is no number to multiply by; give one such as 1.0")
    paths = {name: Path(getattr(options, name)) for name in ("base", "diff_base", "diff_target")}
    base, diff_base, diff_target = (
        open_kind(path, "network", variant=options.variant if name == "base" else None, ema=options.ema)
        for name, path in paths.items()
    )
    entries, fate = merge_entries(base, diff_base, diff_target, options.weight)
    counts = Counter(fate.values())
    if not counts[MERGED]:
        raise UserError(
            f"nothing merged: no tensor of {options.base} has its name and shape in both diff_base= and "
            "diff_target=; give networks of one architecture"
        )
    names = {name: path.name for name, path in paths.items()}
    deed = {"merged": names, "weight": options.weight, "tensors": dict(counts)}
    report = _described(base.report, diff_base.report, diff_target.report)
    # named after dst, where what is copied may turn out not to fit
    new = Checkpoint(replace(report, path=dst), entries)
    write_shown(*prepare(new, None, deed), dst, "ours")
    said = ", ".join(f"{counts[each]} {each}" for each in (MERGED, MISSED, SHAPED, COPIED, LEFT))
    plain = Counter((each, re.sub(r"^blocks[.][0-9]+", "blocks.*", name)) for name, each in fate.items())
    lines = [f"  {each}: {name} ({count})" for (each, name), count in plain.items() if each != MERGED]
    return "\n".join((f"{dst}: {said}", *lines))


def _described(base: Report, diff_base: Report, diff_target: Report) -> Report:
    """What becomes of base: a student's change makes a student of a teacher, SLA's a sparse network."""
    config, sampling = base.config, base.sampling
    if config["attention"] == diff_base.config["attention"] == DENSE:
        config = config | {"attention": diff_target.config["attention"]}
    if sampling and diff_target.sampling and diff_target.sampling.student:
        sampling = choose_sampler(sampling, STUDENT, named_variant(base.variant).tasks[0])
    return replace(base, config=config, sampling=sampling)


main = partial(run, Options, merge)

if __name__ == "__main__":
    main()
