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
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from turbodiffusion.errors import UserError

_FORMAT = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *(
        (_FORMAT, name)
        for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex")
    ),
    *(
        (_FORMAT, name)
        for name in ("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath")),
    *(("pathlib._local", name) for name in ("Path", "PosixPath", "PurePosixPath")),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}")
        return super().find_class(module, name)


def chunked_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]]:
    """Shape, dtype and loader of every tensor in a DCP directory; UserError if it can not be read safely."""
    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(
            f"{folder / '.metadata'} can not be read safely ({error}); nothing in it was run"
        ) from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{folder / '.metadata'} does not describe a DCP checkpoint")
    needed = {info.relative_path for info in metadata.storage_data.values()}
    if missing := sorted(name for name in needed if not (folder / name).is_file()):
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(needed)} files: {', '.join(missing[:5])}; fetch them"
        )
    return {
        name: (tuple(stored.size), stored.properties.dtype, partial(_read, folder, metadata, name))
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


def _read(folder: Path, metadata: Metadata, name: str) -> Tensor:
    stored = metadata.state_dict_metadata[name]
    places = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}
    whole = torch.empty(stored.size, dtype=stored.properties.dtype)
    for chunk in stored.chunks:
        info = places[name, chunk.offsets]
        with (folder / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            packed = io.BytesIO(file.read(info.length))
        try:
            piece = torch.load(packed, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(f"{folder / info.relative_path} is damaged at {name}; fetch it again") from error
        region = tuple(
            slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
        )
        whole[region] = piece
    return whole
