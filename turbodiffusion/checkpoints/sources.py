"""One view of every container a checkpoint may come in: names, shapes, dtypes now, numbers tensor by tensor.

A `Source` holds an `Entry` per tensor.  Renaming, reshaping and de-quantising make new entries from old ones,
so a 14B model is converted or loaded without ever standing in memory twice.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from turbodiffusion.checkpoints.dcp import chunked_tensors
from turbodiffusion.errors import UserError

DCP = "DCP directory"
INDEX_SUFFIX = ".safetensors.index.json"
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")


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

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes, as stored."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """What a checkpoint's container says without reading its numbers."""

    path: Path
    layout: str
    entries: dict[str, Entry]
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
        return _open_index(index) if index.exists() else _open_shards([path])
    return _open_file(path)


def _open_folder(folder: Path, part: str) -> Source:
    for candidate in (folder, folder / "model"):
        if (candidate / ".metadata").is_file():
            return _open_dcp(candidate)
    if (folder / part).is_dir() and (
        (folder / "model_index.json").exists() or (folder / part / "config.json").exists()
    ):
        return _open_folder(folder / part, part)
    if (folder / "high_noise_model").is_dir() or (folder / "low_noise_model").is_dir():
        raise UserError(
            f"{folder} holds two experts; give {folder / 'high_noise_model'} or {folder / 'low_noise_model'}"
        )
    indices = sorted(folder.glob("*" + INDEX_SUFFIX))
    files = sorted(folder.glob("*.safetensors"))
    shards = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    if len(indices) == 1:
        return _open_index(indices[0])
    if shards and len(shards) == len(files) and len({match["stem"] for match in shards}) == 1:
        return _open_shards(files)
    if len(files) == 1:
        source = _open_file(files[0])
        return Source(folder, source.layout, source.entries, source.header, _config_beside(files[0]))
    found = [
        file.name for pattern in ("*.safetensors", "*.pth", "*.pt") for file in sorted(folder.glob(pattern))
    ]
    holds = (
        f"holds several files ({', '.join(found[:6])}); give one of them" if found else "holds no checkpoint"
    )
    raise UserError(f"folder {folder} {holds}")


def _open_index(index: Path) -> Source:
    try:
        placed = json.loads(index.read_text())["weight_map"]
        files = sorted(set(placed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a safetensors index: {error}") from error
    source = _open_shards([index.with_name(name) for name in files])
    if lost := sorted(placed.keys() - source.entries.keys()):
        raise UserError(
            f"{index} promises tensors that its files do not hold: {', '.join(lost[:10])}; fetch it again"
        )
    return source


def _open_shards(files: list[Path]) -> Source:
    """Shards as one source; a numbered shard brings in the rest of its set."""
    if shard := _SHARD.fullmatch(files[0].name):
        total = int(shard["total"])
        names = [f"{shard['stem']}-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
        files = sorted({*files, *(files[0].with_name(name) for name in names)})
    if missing := [file.name for file in files if not file.is_file()]:
        lacks = f"lacks {len(missing)} of {len(files)} shards"
        raise UserError(f"{files[0].parent} {lacks}: {', '.join(missing[:5])}; fetch them")
    entries: dict[str, Entry] = {}
    header: dict[str, str] = {}
    for file in files:
        part = _open_safetensors(file)
        if twice := entries.keys() & part.entries.keys():
            raise UserError(
                f"{file} repeats tensors of another shard, such as {min(twice)}; remove the stray file"
            )
        entries |= part.entries
        header |= part.header
    return Source(
        files[0].parent, f"safetensors, {len(files)} shards", entries, header, _config_beside(files[0])
    )


def _config_beside(file: Path) -> dict[str, object]:
    config = file.with_name("config.json")
    if not config.is_file():
        return {}
    try:
        return dict(json.loads(config.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{config} is not a JSON object: {error}") from error


def _open_file(path: Path) -> Source:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` or download the file itself"
        )
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _open_safetensors(path)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return _open_torch(path)
    raise UserError(f"{path} is not a checkpoint: neither safetensors, a torch file, nor a folder of them")


def _open_safetensors(path: Path) -> Source:
    try:
        handle = safe_open(path, framework="pt")
        entries = {name: _safetensors_entry(handle, name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file (truncated or damaged): {error}") from error
    except KeyError as error:
        raise UserError(
            f"{path} holds tensors of an unknown type {error}; use one of {', '.join(SAFETENSORS_DTYPES)}"
        ) from error
    return Source(path, "safetensors", entries, dict(handle.metadata() or {}))


def _safetensors_entry(handle: safe_open, name: str) -> Entry:
    header = handle.get_slice(name)
    return Entry(
        tuple(header.get_shape()), SAFETENSORS_DTYPES[header.get_dtype()], partial(handle.get_tensor, name)
    )


def _open_torch(path: Path) -> Source:
    whole = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if file.read(2) == b"PK" and not whole:
            raise UserError(f"{path} is a truncated torch file; fetch it again")
    try:
        # only the zip format can be mapped; older pickles are read whole
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(path, str(error))) from error
    except Exception as error:  # a damaged pickle may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a readable torch file (truncated or damaged): {reason}") from error
    return _torch_source(path, loaded)


def _refusal(path: Path, reason: str) -> str:
    if blocked := re.search(r"GLOBAL ([\w.]+)", reason):
        return (
            f"{path} wants to run {blocked[1]} when opened; refused, nothing was run: use a safetensors file"
        )
    return f"{path} is not a torch checkpoint of tensors; nothing in it was run"


def _torch_source(path: Path, loaded: object) -> Source:
    notes = []
    for container in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(container), dict):
            loaded = loaded[container]
            notes.append(f"unwrapped the container {container!r}")
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}; wanted a dictionary of tensors")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    if skipped := [str(name) for name in loaded if name not in tensors]:
        notes.append(f"left aside what is no tensor: {', '.join(skipped[:10])}")
    entries = {str(name): Entry.of(tensor) for name, tensor in tensors.items()}
    return Source(path, "torch file", entries, notes=tuple(notes))


def _open_dcp(folder: Path) -> Source:
    entries = {name: Entry(*described) for name, described in chunked_tensors(folder).items()}
    return Source(folder, DCP, entries)
