"""What every entry point shares: free text on the command line, and errors that are one sentence."""

import errno
import functools
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import hydra
import yaml
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from turbodiffusion.errors import UserError

USER, MACHINE, INTERRUPTED = 2, 1, 130
# Hydra's own flags are left to it
_HYDRA_FLAGS = r"--(hydra-help|version|cfg|resolve|package|run|multirun|info|config-\w+|shell-\w+)\b"


def entry_point(
    config_name: str, *, free_text: Collection[str]
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make a task the `main` of a script whose options are `configs/<config_name>.yaml` beside it.

    free_text names the options whose value is taken literally, whatever characters it holds.
    --help prints the script's docstring and the config file, comments and all.
    Exit codes: 2 for what the user can mend, 1 for the machine (disk, memory), 130 for Ctrl-C.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        file = Path(inspect.getfile(task)).resolve().parent / "configs" / f"{config_name}.yaml"
        folder = str(file.parent)

        def main() -> None:
            if "--help" in sys.argv[1:]:
                sys.stdout.write(f"{inspect.getmodule(task).__doc__}\n{file.read_text()}")
                return
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us instead of Hydra's printer
            names = config_names(file)

            @functools.wraps(task)
            def reported(cfg: DictConfig) -> None:
                # inside Hydra too: it would print its own line before letting an exception through
                with one_sentence(names):
                    for name, text in texts.items():
                        OmegaConf.update(cfg, name, text)
                    task(cfg)

            with one_sentence(names):
                words = [check_form(word, names) for word in sys.argv[1:]]
                texts, sys.argv[1:] = split_texts(words, free_text, names)
                hydra.main(version_base="1.3", config_path=folder, config_name=config_name)(reported)()

        return main

    return decorate


def split_texts(
    words: list[str], free_text: Collection[str], names: Collection[str]
) -> tuple[dict[str, str | None], list[str]]:
    """The free texts by name, ready for OmegaConf, and the words left for Hydra.

    Hydra never sees the text of an option that the config file holds: it would have to be quoted, and where a
    folder of configs has the option's name, be the name of a file there.  Any other free text chooses such a
    file and is quoted.
    """
    texts: dict[str, str | None] = {}
    rest = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in free_text:
            rest.append(word)
        elif name in names:
            # ${...} would be an interpolation; a backslash in front makes it text, and must not meet another
            escaped = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
            texts[name] = None if value == "null" else escaped
        else:
            rest.append(f"{name}={QuotedString(value, Quote.single).with_quotes()}")
    return texts, rest


def check_form(word: str, names: Collection[str]) -> str:
    """The word itself, if it can be a `name=value` option or one of Hydra's own flags."""
    if word.startswith("--") and not re.match(_HYDRA_FLAGS, word):
        name = word[2:].partition("=")[0].replace("-", "_")
        raise UserError(f"{word!r} is not understood: options are written name=value{near(name, names)}.")
    if "=" not in word and not word.startswith(("-", "~")):
        raise UserError(f"{word!r} is not understood: options are written name=value, such as seed=1.")
    return word


def config_names(path: Path) -> list[str]:
    """The option names a config file holds, nested ones with dots."""

    def walk(node: dict[object, object], prefix: str) -> Iterator[str]:
        for key, value in node.items():
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    names = walk(yaml.safe_load(path.read_text(encoding="utf-8")), "")
    return [name for name in names if not name.startswith(("hydra", "defaults"))]


def near(name: str, names: Collection[str]) -> str:
    """', did you mean ...' or nothing."""
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(f'{match}=' for match in close)}" if close else ""


@contextmanager
def one_sentence(names: Collection[str] = ()) -> Iterator[None]:
    """Turn what can be expected to go wrong into one sentence on stderr and an exit code.

    TURBODIFFUSION_TRACEBACK=1 prints the traceback first.  Anything unexpected passes through.
    """
    try:
        yield
    except KeyboardInterrupt:
        _exit("Stopped; no unfinished file was left behind.", INTERRUPTED)
    except UserError as error:
        _exit(str(error), USER)
    except (HydraException, OmegaConfBaseException) as error:
        _exit(_config_sentence(error, names), USER)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        if error.errno == errno.ENOSPC:
            _exit(f"The disk is full{where}: free some space, or choose another place with out=.", MACHINE)
        _exit(f"{error.strerror or error}{where}.", MACHINE)
    except (MemoryError, RuntimeError) as error:
        # by name, so that importing this module does not import torch
        is_known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not is_known and "can't allocate memory" not in str(error):
            raise
        what = str(error).splitlines()[0] if str(error) else "host memory"
        remedy = "pass offload=stage or offload=block, tiling=true, a smaller size= or fewer frames="
        _exit(f"Out of memory: {remedy} ({what}).", MACHINE)


def _exit(sentence: str, code: int) -> NoReturn:
    if os.environ.get("TURBODIFFUSION_TRACEBACK") == "1":
        traceback.print_exc()
    which = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""  # of torchrun's processes
    sys.stderr.write(f"{which}{' '.join(sentence.split())}\n")
    raise SystemExit(code)


def _config_sentence(error: Exception, names: Collection[str]) -> str:
    if isinstance(error.__cause__, UserError):  # raised by what Hydra was building
        return str(error.__cause__)
    text = str(error).strip()
    if unknown := re.match(r"Could not override '([^']+)'", text):
        return f"There is no option {unknown[1]!r}{near(unknown[1], names)}."
    return re.split(r"To append to your config|Config search path|\n\s*full_key", text)[0]
