"""What to generate, item by item: from the command line or from a file of prompts."""

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

from turbodiffusion.errors import UserError

NAME_LENGTH = 48  # characters of a prompt in a file name; at 4 bytes each still a legal one


@dataclass(frozen=True)
class Item:
    """One prompt and what belongs to it.  None: as on the command line.  name: of its file, less suffix."""

    prompt: str
    name: str | None = None
    negative_prompt: str | None = None
    image: Path | None = None
    last_image: Path | None = None
    seed: int | None = None


def read_items(path: Path) -> list[Item]:
    """The items of a .txt (a prompt a line), .json (a list) or .jsonl (an entry a line) file.

    An entry is a prompt or an object with Item's fields; picture paths are relative to the file.
    """
    if not path.is_file():
        raise UserError(f"the prompt file {path} does not exist.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}.") from error
    lines = {f"{path} line {i}": line.strip() for i, line in enumerate(text.splitlines(), 1) if line.strip()}
    if path.suffix == ".txt":
        entries = lines
    elif path.suffix == ".jsonl":
        entries = {where: _parse(line, where) for where, line in lines.items()}
    elif path.suffix == ".json":
        parsed = _parse(text, str(path))
        if not isinstance(parsed, list):
            raise UserError(f"{path} holds a {type(parsed).__name__}, wanted a list of prompts or objects.")
        entries = {f"{path} entry {i}": entry for i, entry in enumerate(parsed, 1)}
    else:
        raise UserError(f"{path}: a prompt file ends in .txt, .json or .jsonl.")
    items = [_item(entry, where, path.parent) for where, entry in entries.items()]
    if not items:
        raise UserError(f"{path} holds no prompt.")
    width = max(4, len(str(len(items))))
    return [
        item if item.name else replace(item, name=f"{i:0{width}d}-{slug(item.prompt)}")
        for i, item in enumerate(items)
    ]


def slug(prompt: str) -> str:
    """A prompt as a file name: its words, joined by dashes."""
    return re.sub(r"[\W_]+", "-", prompt)[:NAME_LENGTH].strip("-").lower() or "video"


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}.") from error


def _item(entry: object, where: str, folder: Path) -> Item:
    if isinstance(entry, str):
        return Item(entry)
    names = [field.name for field in fields(Item)]
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise UserError(f"{where} is neither a prompt nor an object with a prompt.")
    if unknown := entry.keys() - set(names):
        raise UserError(f"{where} has the unknown field {min(unknown)!r}; known are {', '.join(names)}.")
    for name, value in entry.items():
        wanted = int if name == "seed" else str
        if type(value) not in (wanted, type(None)):  # exactly: true is no seed
            kind = "a whole number" if wanted is int else "text"
            raise UserError(f"{where}: {name} is {value!r}, wanted {kind}.")
    if (name := entry.get("name")) and (Path(name).name != name or name.startswith(".")):
        raise UserError(f"{where}: the name {name!r} is not a plain file name.")
    given = {key: entry.get(key) for key in ("image", "last_image")}
    pictures = {key: folder / file if file else None for key, file in given.items()}
    return Item(**{**entry, **pictures})
