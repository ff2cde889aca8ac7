"""The key=value grammar of the tools: a dataclass says what may be given."""

import sys
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from typing import TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from turbodiffusion.cli import one_sentence
from turbodiffusion.errors import UserError

Options = TypeVar("Options")


def parse(kind: type[Options] | Options, arguments: list[str]) -> Options:
    """A `kind` from key=value words, strictly: a field without a default must be given, others may not.

    kind: a dataclass, or one of its values, whose fields are then the defaults.

    A value is taken literally, whatever characters it holds; `null` means None.  Raises UserError naming the
    choices.
    """
    config = OmegaConf.structured(kind)
    names = [field.name for field in fields(kind)]
    choices = " ".join(f"{name}=" for name in names)
    for word in arguments:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not understood: options are written name=value, of {choices}")
        if name not in names:
            close = get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}=? " if close else ""
            raise UserError(f"there is no option {name!r}; {hint}choose from {choices}")
        try:
            config[name] = None if value == "null" else value
        except OmegaConfBaseException as error:
            raise UserError(f"{word} is not understood: {str(error).splitlines()[0]}") from error
    if missing := [name for name in names if OmegaConf.is_missing(config, name)]:
        raise UserError(
            f"{' and '.join(f'{name}=' for name in missing)} must be given; options are {choices}"
        )
    return OmegaConf.to_object(config)


def run(kind: type[Options], task: Callable[[Options], str | None]) -> None:
    """What a tool's `main` does: the task, with the command line's options, and print what it says."""
    with one_sentence():
        if said := task(parse(kind, sys.argv[1:])):
            print(said)


__all__ = ["MISSING", "parse", "run"]
