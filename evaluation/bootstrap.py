"""How far scores may be off: prompts drawn again and again, with replacement."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from evaluation.records import Record
from evaluation.vbench import board_of

REPLICATES = 2000


def sums(records: Iterable[Record], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Totals and units (2, prompts), fp64, of every dimension; failures count as nothing."""
    place = {prompt: i for i, prompt in enumerate(prompts)}
    found: dict[str, Tensor] = {}
    for record in records:
        if record.score is not None:
            table = found.setdefault(record.dimension, torch.zeros(2, len(prompts), dtype=torch.float64))
            table[0, place[record.prompt]] += record.score.total
            table[1, place[record.prompt]] += record.score.units
    return found


def draws(prompts: int) -> Tensor:
    """How often each prompt is drawn, (REPLICATES, prompts) fp64; the same numbers for the same count.

    Prompts are drawn, not videos: those of one prompt resemble each other.
    """
    index = torch.randint(prompts, (REPLICATES, prompts), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(REPLICATES, prompts, dtype=torch.float64)
    return counts.scatter_add_(1, index, torch.ones_like(counts))


def scores(tables: Mapping[str, Tensor], drawn: Tensor) -> dict[str, Tensor]:
    """Every dimension's score (R,), prompts weighted by drawn (R, prompts); VBench's totals if complete."""
    raw = {name: (drawn @ total) / (drawn @ units) for name, (total, units) in tables.items()}
    totals = board_of(raw).totals(raw)
    return raw | totals.groups | ({} if totals.total is None else {"total": totals.total})


def replicated(
    records: Iterable[Record], prompts: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The scores of records (1,), and those of all drawings of their prompts (REPLICATES,)."""
    tables, drawn = sums(records, prompts), draws(len(prompts))
    return scores(tables, drawn.new_ones(1, len(prompts))), scores(tables, drawn)


def interval(values: Tensor) -> list[float]:
    """The middle 95 % of replicates (R,), those that drew nothing of a dimension left out."""
    return values.nanquantile(values.new_tensor([0.025, 0.975])).tolist()
