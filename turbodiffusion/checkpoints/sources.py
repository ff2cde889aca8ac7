"""One view of every container a checkpoint may come in: names, shapes, dtypes now, numbers tensor by tensor.

A `Source` holds an `Entry` per tensor.  Renaming, reshaping and de-quantising make new entries from old ones,
so a 14B model is converted or loaded without ever standing in memory twice.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from turbodiffusion.checkpoints.dcp import chunked_tensors
from turbodiffusion.errors import UserError

DCP = "DCP directory"
INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<total>\d{5})\.safetensors")


@dataclass(frozen=True)
class Entry:
    """A stored tensor, not yet read.  `load` gives it on the CPU; it may alias the file: copy to keep it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "Entry":
        """The entry of a tensor that is already there."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.detach)

    def to(self, dtype: torch.dtype) -> "Entry":
        """The tensor in another dtype."""
        return replace(self, dtype=dtype, load=lambda: self.load().to(dtype))

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes, as stored."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Entries = dict[str, Entry]
State = dict[str, Tensor]


def mapped(entries: Entries, rename: Callable[[State], State]) -> Entries:
    """The tensors renamed by a function of state dicts.  Files are mapped, so nothing is read yet."""
    state = rename({name: entry.load() for name, entry in entries.items()})
    return {name: Entry.of(tensor) for name, tensor in state.items()}


@dataclass(frozen=True)
class Source:
    """What a checkpoint's container says without reading its numbers."""

    path: Path
    layout: str
    entries: Entries
    header: dict[str, str] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_source(path: str | Path, part: str = "transformer") -> Source:
    """Open a safetensors file, shards, a torch pickle, a DCP directory or a diffusers folder.

    `part` is the subfolder taken when `path` is a whole diffusers pipeline.  Raises UserError for whatever
    can not be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path, part)
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist; give an existing file or folder")
    if path.name.endswith(INDEX_SUFFIX):
        return _open_index(path)
    if shard := _SHARD.fullmatch(path.name):
        index = path.with_name(shard["stem"] + INDEX_SUFFIX)
        if index.exists():
            return _open_index(index)
        total = int(shard["total"])
        names = (f"{shard['stem']}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1))
        return _open_shards([path.with_name(name) for name in names])
    return _open_file(path)


def _open_folder(folder: Path, part: str) -> Source:
    for candidate in (folder, folder / "model"):
        if (candidate / ".metadata").is_file():
            entries = {name: Entry(*described) for name, described in chunked_tensors(candidate).items()}
            return Source(candidate, DCP, entries)
    inner = folder / part
    if inner.is_dir() and ((folder / "model_index.json").exists() or (inner / "config.json").exists()):
        return _open_folder(inner, part)
    if (folder / "high_noise_model").is_dir() or (folder / "low_noise_model").is_dir():
        raise UserError(f"{folder} holds two experts; give its high_noise_model or its low_noise_model")
    files = (
        sorted(folder.glob("*" + INDEX_SUFFIX))
        or sorted(folder.glob("*.safetensors"))
        or sorted([*folder.glob("*.pth"), *folder.glob("*.pt")])
    )
    if not files:
        raise UserError(f"folder {folder} holds no checkpoint")
    # shards of one set count once
    sets = {shard.groups() if (shard := _SHARD.fullmatch(file.name)) else file.name for file in files}
    # a torch file's own name may say what nothing in it does
    if len(sets) > 1 or files[0].suffix in (".pth", ".pt"):
        names = ", ".join(file.name for file in files[:6])
        raise UserError(f"folder {folder} holds {names}; give one of these files")
    return replace(open_source(files[0]), path=folder, config=_config_beside(files[0]))


def _open_index(index: Path) -> Source:
    try:
        placed = json.loads(index.read_text())["weight_map"]
        files = sorted(set(placed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a safetensors index: {error}") from error
    source = _open_shards([index.with_name(name) for name in files])
    if lost := sorted(placed.keys() - source.entries.keys()):
        raise UserError(
            f"{index} promises what its files do not hold: {', '.join(lost[:10])}; fetch it again"
        )
    return source


def _open_shards(files: list[Path]) -> Source:
    folder = files[0].parent
    if missing := [file.name for file in files if not file.is_file()]:
        names = ", ".join(missing[:5])
        raise UserError(f"{folder} lacks {len(missing)} of {len(files)} shards: {names}; fetch them")
    whole = Source(folder, f"safetensors, {len(files)} shards", {}, config=_config_beside(files[0]))
    for file in files:
        part = _open_safetensors(file)
        if twice := whole.entries.keys() & part.entries.keys():
            raise UserError(f"{file} repeats {min(twice)} of another shard; remove the stray file")
        whole.entries.update(part.entries)
        whole.header.update(part.header)
    return whole


def _config_beside(file: Path) -> dict[str, object]:
    config = file.with_name("config.json")
    try:
        return dict(json.loads(config.read_text())) if config.is_file() else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{config} is not a JSON object: {error}") from error


def _open_file(path: Path) -> Source:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer; run `git lfs pull` or download the file itself")
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _open_safetensors(path)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return _open_torch(path)
    raise UserError(f"{path} is not a checkpoint: neither safetensors, a torch file, nor a folder of them")


def _open_safetensors(path: Path) -> Source:
    entries = {}
    try:
        handle = safe_open(path, framework="pt")
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            load = partial(handle.get_tensor, name)
            # mapped, not read
            entries[name] = replace(Entry.of(load()), load=load)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file (truncated or damaged): {error}") from error
    return Source(path, "safetensors", entries, dict(handle.metadata() or {}))


def _open_torch(path: Path) -> Source:
    try:
        # only the zip format can be mapped; older pickles are read whole
        mmap = zipfile.is_zipfile(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        said = f"{path} is not a torch checkpoint of tensors; nothing in it was run"
        if blocked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            said = f"{path} wants to run {blocked[1]} when opened; nothing was run: use a safetensors file"
        raise UserError(said) from error
    except Exception as error:  # a damaged pickle may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a readable torch file (truncated or damaged): {reason}") from error
    return _torch_source(path, loaded)


def _torch_source(path: Path, loaded: object) -> Source:
    notes = []
    for container in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(container), dict):
            loaded = loaded[container]
            notes.append(f"unwrapped the container {container!r}")
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}; wanted a dictionary of tensors")
    entries = {str(name): Entry.of(x) for name, x in loaded.items() if isinstance(x, Tensor)}
    if skipped := [str(name) for name in loaded if str(name) not in entries]:
        notes.append(f"left aside what is no tensor: {', '.join(skipped[:10])}")
    return Source(path, "torch file", entries, notes=tuple(notes))
