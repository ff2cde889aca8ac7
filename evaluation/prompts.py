"""What videos were asked to show, and how their files are named: `{prompt}-{sample}.mp4`."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from evaluation.vbench import DIMENSIONS
from turbodiffusion.errors import UserError

SAMPLES = 5  # videos a prompt on the leaderboard
STANDARD = "5dd2de80ee43cda750b2b72ea7023657c0b90d3702041c7e4608c65dbe50dccd"


@dataclass(frozen=True)
class Prompt:
    """name: of its files, less sample and suffix.  dimensions: of VBench that look at it; None, all.

    index: its place in the file it came from.  auxiliary: what dimensions need beside the text, by dimension.
    image: the name of its first frame's file.
    """

    name: str
    text: str
    index: int = 0
    dimensions: frozenset[str] | None = None
    auxiliary: Mapping[str, object] = field(default_factory=dict)
    image: str | None = None


@dataclass(frozen=True)
class Suite:
    """Prompts with distinct names.  samples: wanted of each; None, any.  sha256: of the file."""

    prompts: tuple[Prompt, ...]
    sha256: str
    samples: int | None = None

    @property
    def is_standard(self) -> bool:
        """Whether these are the leaderboard's prompts, to the byte."""
        return self.sha256 == STANDARD

    def counts(self) -> Counter[str]:
        """Prompts of each dimension that any names."""
        return Counter(name for prompt in self.prompts for name in prompt.dimensions or ())


def file_name(prompt: str, sample: int) -> str:
    """The name of a prompt's video."""
    return f"{prompt}-{sample}.mp4"


def parse_name(stem: str) -> tuple[str, int | None]:
    """Prompt and sample of a file's stem; no sample where it ends in no number."""
    match = re.fullmatch(r"(.+)-(\d+)", stem, re.DOTALL)
    return (match[1], int(match[2])) if match else (stem, None)


def read_prompts(path: Path) -> Suite:
    """The prompts of a file; UserError says what is wrong with it and where.

    .txt: a prompt a line.  .json: `{file: prompt}`, or VBench_full_info.json, which upstream ships.
    .jsonl: objects with `prompt` and, if wanted, `name`, `dimension`, `auxiliary_info` and `image`.
    """
    if not path.is_file():
        raise UserError(f"the prompt file {path} does not exist")
    try:
        data = path.read_bytes()
        entries = list(_entries(path, data.decode("utf-8-sig")))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} can not be read: {error}") from error
    prompts: dict[str, Prompt] = {}
    for index, (where, entry) in enumerate(entries):
        new = _prompt(entry, index, where)
        old = prompts.setdefault(new.name, new)
        if old.text != new.text:
            raise UserError(f"{where}: {new.name!r} already names the videos of {old.text!r}")
        prompts[new.name] = _merged(old, new)
    if not prompts:
        raise UserError(f"{path} holds no prompt")
    is_suite = all(isinstance(entry, dict) and "prompt_en" in entry for _, entry in entries)
    return Suite(tuple(prompts.values()), hashlib.sha256(data).hexdigest(), SAMPLES if is_suite else None)


def _entries(path: Path, text: str) -> Iterator[tuple[str, object]]:
    """What a file holds, each with where it is."""
    if path.suffix == ".json":
        content = json.loads(text)
        if isinstance(content, dict):
            content = [{"prompt": prompt, "name": Path(file).stem} for file, prompt in content.items()]
        if not isinstance(content, list):
            raise UserError(
                f"{path} holds a {type(content).__name__}; wanted a list, or file names with prompts"
            )
        yield from ((f"{path} entry {i}", entry) for i, entry in enumerate(content, 1))
    elif path.suffix in (".txt", ".jsonl"):
        for i, line in enumerate(text.splitlines(), 1):
            if line.strip():
                entry = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line.strip()}
                yield f"{path} line {i}", entry
    else:
        raise UserError(f"{path}: a prompt file ends in .txt, .json or .jsonl")


def _prompt(entry: object, index: int, where: str) -> Prompt:
    text = entry.get("prompt_en", entry.get("prompt")) if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text:
        raise UserError(f"{where} has no prompt: got {json.dumps(entry)[:80]}")
    name, auxiliary = entry.get("name", text), entry.get("auxiliary_info", {})
    dimensions = entry.get("dimension")
    if not isinstance(name, str) or "/" in name:
        raise UserError(
            f"{where}: {name!r} can not name a file; give the entry another `name` in a .jsonl file"
        )
    if not isinstance(auxiliary, dict) or not isinstance(dimensions, list | None):
        raise UserError(f"{where}: `auxiliary_info` must be an object and `dimension` a list")
    if unknown := sorted({str(each) for each in dimensions or ()} - DIMENSIONS.keys()):
        raise UserError(f"{where}: there is no dimension {', '.join(unknown)}")
    image = entry.get("image_name", entry.get("image"))
    if not isinstance(image, str | None):
        raise UserError(f"{where}: `image` must be the name of a file")
    theirs = None if dimensions is None else frozenset(dimensions)
    return Prompt(name, text, index, theirs, auxiliary, image)


def _merged(old: Prompt, new: Prompt) -> Prompt:
    """One prompt that is listed twice, for dimensions of its own each time: one file serves both."""
    both = old.dimensions, new.dimensions
    together = None if None in both else frozenset().union(*both)
    return replace(old, dimensions=together, auxiliary={**old.auxiliary, **new.auxiliary})
