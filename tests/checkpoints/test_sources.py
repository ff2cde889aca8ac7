import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from turbodiffusion.checkpoints.sources import Source, open_source
from turbodiffusion.errors import UserError

STATE = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).bfloat16(),
    "c": torch.randint(-128, 127, (4, 2), dtype=torch.int8),
    "d": torch.tensor(2.5),
    "e": torch.randn(2, 2).to(torch.float8_e4m3fn),
}
# the old format knows no 8-bit floats
OLD_STATE = {name: tensor for name, tensor in STATE.items() if name != "e"}


class Malicious:
    """Unpickling it runs a command that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def write_shards(folder: Path, *, index: bool) -> Path:
    names = list(STATE)
    placed = {}
    folder.mkdir()
    for number, part in enumerate((names[:2], names[2:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: STATE[name] for name in part}, folder / file)
        placed |= dict.fromkeys(part, file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


def write(kind: str, folder: Path) -> Path:  # noqa: PLR0912 (one case a container)
    path = folder / "checkpoint"
    match kind:
        case "safetensors":
            save_file(STATE, path := path.with_suffix(".safetensors"), metadata={"made": "here"})
        case "safetensors with another suffix":
            save_file(STATE, path := path.with_suffix(".bin"))
        case "folder of one":
            path.mkdir()
            save_file(STATE, path / "model.safetensors")
        case "index":
            write_shards(path, index=True)
        case "index file":
            path = write_shards(path, index=True) / "model.safetensors.index.json"
        case "numbered shards":
            write_shards(path, index=False)
        case "one shard of an index":
            path = write_shards(path, index=True) / "model-00001-of-00002.safetensors"
        case "one numbered shard":
            path = write_shards(path, index=False) / "model-00002-of-00002.safetensors"
        case "diffusers pipeline":
            path.mkdir()
            (path / "model_index.json").write_text("{}")
            write_shards(path / "transformer", index=True)
        case "torch":
            torch.save(STATE, path := path.with_suffix(".pth"))
        case "torch, old":
            torch.save(OLD_STATE, path := path.with_suffix(".pt"), _use_new_zipfile_serialization=False)
        case "torch, state_dict":
            torch.save({"state_dict": STATE, "step": 3}, path := path.with_suffix(".pth"))
        case "torch, model":
            torch.save({"model": STATE}, path := path.with_suffix(".pth"))
        case "dcp":
            dcp.save(STATE | {"step": 3, "nested": {"x": [1, 2]}}, checkpoint_id=path, no_dist=True)
        case "dcp, model":
            path.mkdir()
            dcp.save(STATE, checkpoint_id=path / "model", no_dist=True)
    return path


KINDS = [
    *("safetensors", "safetensors with another suffix", "folder of one", "index", "index file"),
    *("numbered shards", "one shard of an index", "one numbered shard", "diffusers pipeline"),
    *("torch", "torch, old", "torch, state_dict", "torch, model", "dcp", "dcp, model"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_every_container_gives_names_shapes_dtypes_and_numbers(kind: str, tmp_path: Path) -> None:
    source, state = open_source(write(kind, tmp_path)), OLD_STATE if kind == "torch, old" else STATE
    described = {name: (entry.shape, entry.dtype) for name, entry in source.entries.items()}
    assert described == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    for name, tensor in state.items():
        loaded = source.entries[name].load()
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded.float(), tensor.float())
        assert source.entries[name].nbytes == tensor.nbytes


def test_the_header_is_kept(tmp_path: Path) -> None:
    assert open_source(write("safetensors", tmp_path)).header == {"made": "here"}


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        open_source(path)
    sentence = str(refused.value)
    assert str(path) in sentence or str(path.parent) in sentence
    assert len(sentence.splitlines()) == 1
    return sentence


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, -10])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "torch, old"])
def test_truncated_files_are_refused(kind: str, kept: int, tmp_path: Path) -> None:
    path = write(kind, tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    assert refusal(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.pth"
    path.write_text("these are notes, and not a checkpoint")
    assert "not a checkpoint" in refusal(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "git lfs pull" in refusal(path)


def test_a_torch_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], path := tmp_path / "list.pth")
    assert "holds a list" in refusal(path)


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"])
@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(name: str, index: bool, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "folder", index=index)
    (folder / name).unlink()
    assert name in refusal(folder)


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    index = write("index file", tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    assert "ghost" in refusal(index)
    index.write_text("{")
    assert "not a safetensors index" in refusal(index)


def test_a_folder_of_several_checkpoints_is_refused_with_their_names(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file(STATE, tmp_path / f"{name}.safetensors")
    assert "one.safetensors, two.safetensors" in refusal(tmp_path)


def test_a_folder_of_two_experts_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "high_noise_model").mkdir()
    (tmp_path / "low_noise_model").mkdir()
    assert "high_noise_model" in refusal(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("kind", ["torch", "torch, old", "plain pickle"])
def test_code_in_a_pickle_is_refused_and_does_not_run(kind: str, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "model.pth"
    payload = {"a": torch.ones(2), "evil": Malicious(trace)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=kind == "torch")
    sentence = refusal(path)
    assert not trace.exists()
    assert "was run" in sentence
    assert kind == "plain pickle" or "system" in sentence
    # the file is no dud: an unrestricted reader does run it
    pickle.loads(path.read_bytes()) if kind == "plain pickle" else torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_code_in_dcp_metadata_is_refused_and_does_not_run(tmp_path: Path) -> None:
    folder, trace = write("dcp", tmp_path), tmp_path / "trace"
    (folder / ".metadata").write_bytes(pickle.dumps(Malicious(trace)))
    assert "system" in refusal(folder)
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_damaged_dcp_directories_are_refused(tmp_path: Path) -> None:
    folder = write("dcp", tmp_path)
    data = next(folder.glob("*.distcp"))
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 4])
    source = open_source(folder)
    with pytest.raises(UserError, match="damaged"):
        read_all(source)
    data.unlink()
    assert data.name in refusal(folder)
    (folder / ".metadata").write_bytes(b"\x80\x04nothing")
    assert "nothing in it was run" in refusal(folder)


def read_all(source: Source) -> list[Tensor]:
    return [entry.load() for entry in source.entries.values()]


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_tensor_in_several_chunks_is_put_together(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    # halves stored under two names, then declared to be chunks of one, as ranks write them
    whole = torch.randn(6, 4)
    dcp.save({"x": whole[:2].clone(), "y": whole[2:].clone()}, checkpoint_id=tmp_path / "d", no_dist=True)
    file = tmp_path / "d" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    x, low = metadata.state_dict_metadata["x"], metadata.storage_data
    x.size = torch.Size((6, 4))
    x.chunks = [
        ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((2, 4))),
        ChunkStorageMetadata(torch.Size((2, 0)), torch.Size((4, 4))),
    ]
    del metadata.state_dict_metadata["y"]
    places = {index.fqn: info for index, info in low.items()}
    metadata.storage_data = {
        MetadataIndex("x", torch.Size((0, 0))): places["x"],
        MetadataIndex("x", torch.Size((2, 0))): places["y"],
    }
    file.write_bytes(pickle.dumps(metadata))
    assert torch.equal(open_source(tmp_path / "d").entries["x"].load(), whole)
