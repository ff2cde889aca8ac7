"""torch.distributed.checkpoint directories, read tensor by tensor: no process group, and no pickle is run.

PyTorch's own reader opens `.metadata` as any pickle; here only the classes it is made of are let in.
"""

import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from turbodiffusion.errors import UserError

_PATHS = {"Path", "PosixPath", "PurePosixPath"}
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}")
        return super().find_class(module, name)


def chunked_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]]:
    """Shape, dtype and loader of every tensor in a DCP directory; UserError if it can not be read safely."""
    index = folder / ".metadata"
    try:
        with index.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{index} can not be read safely ({error}); nothing in it was run") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{index} does not describe a DCP checkpoint")
    needed = {info.relative_path for info in metadata.storage_data.values()}
    if missing := sorted(name for name in needed if not (folder / name).is_file()):
        names = ", ".join(missing[:5])
        raise UserError(f"{folder} lacks {len(missing)} of {len(needed)} files: {names}; fetch them")
    return {
        name: (tuple(stored.size), stored.properties.dtype, partial(_read, folder, metadata, name))
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


def _read(folder: Path, metadata: Metadata, name: str) -> Tensor:
    stored = metadata.state_dict_metadata[name]
    whole = torch.empty(stored.size, dtype=stored.properties.dtype)
    for chunk in stored.chunks:
        place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        with (folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            packed = io.BytesIO(file.read(place.length))
        try:
            piece = torch.load(packed, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(f"{folder / place.relative_path} is damaged at {name}; fetch it again") from error
        ends = map(sum, zip(chunk.offsets, chunk.sizes, strict=True))
        whole[tuple(map(slice, chunk.offsets, ends))] = piece
    return whole
