"""What the commands share: their command lines, and tables in Markdown."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from omegaconf import OmegaConf

from turbodiffusion.cli import one_sentence

Options = TypeVar("Options")


def run(kind: type[Options], task: Callable[[Options], object]) -> None:
    """Do the task with key=value options from the command line; `kind` is a dataclass of those there are."""
    with one_sentence():
        options = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.from_cli())
        task(OmegaConf.to_object(options))


def line(cells: Iterable[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def heading(names: Sequence[str], *, texts: int = 1) -> list[str]:
    """The first two lines of a table; the first columns, `texts` of them, hold no numbers."""
    return [line(names), "|" + "---|" * texts + "---:|" * (len(names) - texts)]
