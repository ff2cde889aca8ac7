"""Shards: files of encoded clips in two layouts (docs/data.md), of which any sample can be read by itself.

A tar's members are listed once and then read by offset.  The webdataset library reads shards from end to
end, so it can neither draw one order over all samples nor enter it in the middle: stdlib tarfile it is.
"""

import glob
import json
import pickle
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from turbodiffusion.checkpoints.files import appearing
from turbodiffusion.errors import UserError

DIMENSIONS = {"context": 2, "latents": 4, "condition": 4, "clip": 2}
SUFFIXES = {
    "prompt": "prompt.txt",
    "context": "embed.pt",
    "latents": "latent.pt",
    "condition": "condition.pt",
    "clip": "clip.pt",
}
TEXT = ("prompt", "context")


@dataclass(frozen=True)
class Sample:
    """One clip and what a network is told about it, on the CPU; text alone has no latents."""

    prompt: str
    context: Tensor  # (S, E), zero past the prompt's end
    latents: Tensor | None = None  # (C, T, h, w), normalised
    condition: Tensor | None = None  # (channels, T, h, w)
    clip: Tensor | None = None  # (P, 1280)

    def tensors(self) -> dict[str, Tensor]:
        """Those there are, by name."""
        return {name: x for name in DIMENSIONS if (x := getattr(self, name)) is not None}

    def checked(self, where: str) -> "Sample":
        """Itself; UserError says `where` a tensor has a wrong shape or is not finite."""
        for name, x in self.tensors().items():
            if x.ndim != DIMENSIONS[name]:
                raise UserError(f"{where}: {name} has the shape {tuple(x.shape)}, not {DIMENSIONS[name]}-d")
            if not x.isfinite().all():
                raise UserError(f"{where}: {name} holds NaN or infinity; make this sample again")
        return self


Keyed = tuple[str, Sample]


class TarShard:
    """A shard of the published layout."""

    def __init__(self, path: Path, *, text_only: bool = False):
        self.path, self.names = path, TEXT if text_only else tuple(SUFFIXES)
        members = _members(path)
        self.keys = list(members)
        # (N, names, 2): offset and bytes; one tensor, since a large set has a million members
        self.places = torch.tensor([[of.get(name, (0, 0)) for name in self.names] for of in members.values()])

    def read(self, number: int) -> Sample:
        """The sample of keys[number]; UserError names file and key if it is damaged."""
        parts, where = {}, f"{self.path}, sample {self.keys[number]}"
        with self.path.open("rb") as file:
            for name, (offset, size) in zip(self.names, self.places[number].tolist(), strict=True):
                if offset:
                    file.seek(offset)
                    parts[name] = _decoded(file.read(size), name, where)
                elif name in (*TEXT, "latents"):
                    raise UserError(f"{where}: .{SUFFIXES[name]} is missing; fetch or make it again")
        return Sample(**parts).checked(where)


def _members(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Offset and size of every member, by key and by Sample's names; of a name written twice, the last."""
    names = {suffix: name for name, suffix in SUFFIXES.items()}
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                if member.isfile() and suffix in names:
                    places = found.setdefault(f"{folder}{slash}{stem}", {})
                    places[names[suffix]] = (member.offset_data, member.size)
            # a file cut between two members still reads like a whole one, but for the empty block at its end
            if path.stat().st_size < tar.offset + tarfile.BLOCKSIZE:
                raise tarfile.ReadError("no end mark")
    except (tarfile.TarError, OSError) as error:
        last = f" after sample {list(found)[-1]}" if found else ""
        raise UserError(f"{path} is not a whole tar{last} ({error}); fetch or make it again") from error
    return found


def _decoded(data: bytes, name: str, where: str) -> str | Tensor:
    member = f"{where}: .{SUFFIXES[name]}"
    try:
        if name == "prompt":
            return data.decode()
        value = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{member} can not be read ({reason}); fetch or make it again") from error
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise UserError(f"{member} holds {type(value).__name__}, wanted a floating-point tensor")
    return value


class SafetensorsShard:
    """A shard of our own layout."""

    def __init__(self, path: Path, *, text_only: bool = False):
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.keys: list[str] = json.loads(file.metadata()["shard"])["keys"]
                self.ends: list[int] = file.get_tensor("lengths").cumsum(0).tolist()
                self.names = set(file.keys()) & (DIMENSIONS.keys() - {"context"})
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is truncated or no shard ({error}); make it again") from error
        if text_only:
            self.names.clear()
        elif "latents" not in self.names:
            raise UserError(f"{path} holds texts without clips: pass text_only=true, or another path")

    def read(self, number: int) -> Sample:
        """The sample of keys[number]; UserError names file and key if it is damaged."""
        start = self.ends[number - 1] if number else 0
        with safe_open(self.path, framework="pt") as file:
            head = json.loads(file.metadata()["shard"])
            context = file.get_slice("context")[start : self.ends[number]]
            parts = {name: file.get_slice(name)[number] for name in self.names}
        context = F.pad(context, (0, 0, 0, head["text_length"] - len(context)))
        where = f"{self.path}, sample {self.keys[number]}"
        return Sample(head["prompts"][number], context, **parts).checked(where)


Shard = TarShard | SafetensorsShard
SHARDS: dict[str, type[Shard]] = {".tar": TarShard, ".safetensors": SafetensorsShard}


def find_shards(path: str) -> list[Path]:
    """The shards of a folder (its files shard_*) or of a glob, sorted; UserError if there are none."""
    place = Path(path).expanduser()
    pattern = f"{glob.escape(str(place))}/shard_*" if place.is_dir() else str(place)
    files = sorted(file for file in map(Path, glob.glob(pattern)) if file.suffix in SHARDS)
    if not files:
        wanted = " or ".join(f"shard_*{suffix}" for suffix in SHARDS)
        raise UserError(f"{path} holds no shards: wanted a folder of {wanted} files, or a pattern of such")
    return files


def write_tar(path: Path, samples: Iterable[Keyed]) -> None:
    """A shard of the published layout; equal samples give equal bytes."""
    with appearing(path) as part, tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, sample in samples:
            members = {"prompt": sample.prompt.encode()}
            for name, x in sample.tensors().items():
                stored = BytesIO()
                # a view would bring all it is a view of
                torch.save(x.clone(memory_format=torch.contiguous_format), stored)
                members[name] = stored.getvalue()
            for name, data in members.items():
                header = tarfile.TarInfo(f"{key}.{SUFFIXES[name]}")
                header.size = len(data)
                tar.addfile(header, BytesIO(data))


def write_safetensors(path: Path, samples: Iterable[Keyed]) -> None:
    """A shard of our own layout.  The samples, at least one, are alike in shapes; all are held in memory."""
    keys, rows = zip(*samples, strict=True)
    columns = {name: [row.tensors()[name] for row in rows] for name in rows[0].tensors()}
    contexts = [context[: _length(context)] for context in columns.pop("context")]
    tensors = {name: torch.stack(column) for name, column in columns.items()}
    tensors |= {"context": torch.cat(contexts), "lengths": torch.tensor([len(x) for x in contexts])}
    head = {"keys": keys, "prompts": [row.prompt for row in rows], "text_length": len(rows[0].context)}
    with appearing(path) as part:
        save_file(tensors, part, {"shard": json.dumps(head, ensure_ascii=False)})


WRITERS = {"tar": write_tar, "safetensors": write_safetensors}


def _length(context: Tensor) -> int:
    """Rows of (S, E) up to the last that is not zero."""
    rows = context.ne(0).any(dim=1).nonzero()
    return int(rows.max()) + 1 if len(rows) else 0


def write_context(path: Path, context: Tensor, prompt: str) -> None:
    """The embedding (S, E) of one prompt, such as the negative one: a shard of this text alone."""
    write_safetensors(path, [("context", Sample(prompt, context))])


def read_context(path: str | Path) -> Tensor:
    """The embedding (S, E) of such a file, or of a published .pt with nothing but the tensor."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path} does not exist: make it with python -m tools.make_data mode=negative")
    if file.suffix == ".safetensors":
        return SafetensorsShard(file, text_only=True).read(0).context
    context = _decoded(file.read_bytes(), "context", str(file))
    return Sample("", context).checked(str(file)).context
