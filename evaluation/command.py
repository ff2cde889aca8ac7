"""What the commands share: their command lines, files of text, and tables in Markdown."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from omegaconf import OmegaConf

from turbodiffusion.checkpoints.files import appearing
from turbodiffusion.cli import one_sentence

Options = TypeVar("Options")


def run(kind: type[Options], task: Callable[[Options], object]) -> None:
    """Do the task with key=value options from the command line; `kind` is a dataclass of those there are."""
    with one_sentence():
        options = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.from_cli())
        task(OmegaConf.to_object(options))


def write(folder: Path, texts: Mapping[str, str]) -> None:
    """Files of a folder by name, each of which appears whole."""
    for name, text in texts.items():
        with appearing(folder / name) as part:
            part.write_text(text, encoding="utf-8")


def line(cells: Iterable[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def heading(names: Sequence[str], *, texts: int = 1) -> list[str]:
    """The first two lines of a table; the first columns, `texts` of them, hold no numbers."""
    return [line(names), "|" + "---|" * texts + "---:|" * (len(names) - texts)]
