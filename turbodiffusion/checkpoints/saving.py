"""Tensors to files: streamed, so that nothing is held twice."""

import json
import struct
from functools import cache
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import nn

from turbodiffusion.attention import trained
from turbodiffusion.checkpoints.files import appearing
from turbodiffusion.checkpoints.metadata import Metadata, kind_of
from turbodiffusion.checkpoints.sources import INDEX_SUFFIX, Entries, Entry
from turbodiffusion.variants import Sampling

STEM = "diffusion_pytorch_model"


def save(
    path: str | Path,
    module: nn.Module,
    *,
    sampling: Sampling | None = None,
    variant: str | None = None,
    history: list[dict[str, object]] | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a network, VAE or encoder as one safetensors file that says how to build and to sample it.

    The file appears whole or not at all, and replaces what was there.  Raises UserError if that fails.
    weights are written in place of the module's own.
    """
    kind, config = kind_of(module), module.config
    if kind == "network":
        config = config | {"attention": trained(config["attention"])}
    metadata = Metadata(kind, config, variant, sampling, tuple(history or ()))
    tensors = module.state_dict() if weights is None else weights
    entries = {name: Entry.of(tensor) for name, tensor in tensors.items()}
    write_safetensors(Path(path).expanduser(), entries, metadata.header())


def write_safetensors(path: Path, entries: Entries, header: dict[str, str]) -> None:
    """One safetensors file, which takes no more memory than its largest tensor."""
    # widest first: every tensor is aligned to its own width
    names = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    described: dict[str, object] = {"__metadata__": header}
    end = 0
    for name in names:
        start, end = end, end + entries[name].nbytes
        described[name] = {
            "dtype": _dtype_name(entries[name].dtype),
            "shape": entries[name].shape,
            "data_offsets": (start, end),
        }
    head = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with appearing(path, 8 + len(head) + end) as part, part.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name in names:
            tensor = entries[name].load().detach().cpu().contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())


def write_shards(folder: Path, entries: Entries, header: dict[str, str], max_shard: int) -> None:
    """Safetensors files of at most `max_shard` bytes (a larger tensor has its own) with their index."""
    split = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern=STEM + "{suffix}.safetensors",
        max_shard_size=max_shard,
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, {name: entries[name] for name in names}, header)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / (STEM + INDEX_SUFFIX), index)


def write_torch(path: Path, entries: Entries) -> None:
    """A flat torch file, as rCM and TurboDiffusion release them; holds one copy of the tensors."""
    with appearing(path, sum(entry.nbytes for entry in entries.values())) as part, part.open("wb") as file:
        try:
            torch.save({name: entry.load() for name, entry in entries.items()}, file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"torch.save: {str(error).splitlines()[0]}") from error


def write_json(path: Path, content: dict[str, object]) -> None:
    """Readable JSON."""
    with appearing(path) as part:
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@cache
def _dtype_name(dtype: torch.dtype) -> str:
    # as the library spells it in the header of a file of its own
    return json.loads(safetensors.torch.save({"x": torch.empty(0, dtype=dtype)})[8:])["x"]["dtype"]
