import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from turbodiffusion.checkpoints import detect, save
from turbodiffusion.checkpoints.files import appearing, appearing_folder
from turbodiffusion.checkpoints.saving import write_safetensors, write_shards
from turbodiffusion.checkpoints.sources import Entry, open_source
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel
from turbodiffusion.variants import variant

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def test_the_safetensors_library_reads_every_dtype_and_shape(tmp_path: Path) -> None:
    shapes = [(3, 5), (), (0, 4), (7,), (1, 2, 3, 1, 2)]
    tensors = {f"{dtype}.{shape}": torch.ones(shape).to(dtype) for dtype in DTYPES for shape in shapes}
    tensors["not contiguous"] = torch.randn(4, 6).T[1:, ::2]
    entries = {name: Entry.of(tensor) for name, tensor in tensors.items()}
    write_safetensors(path := tmp_path / "x.safetensors", entries, {"作": "者"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(loaded[name].float(), tensor.float())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"作": "者"}


def test_shards_hold_no_more_than_asked_and_diffusers_index_finds_them(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(10) for i in range(7)} | {"large": torch.randn(100)}
    write_shards(tmp_path, {name: Entry.of(t) for name, t in tensors.items()}, {}, max_shard=90)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 170
    for file in set(index["weight_map"].values()):
        held = load_file(tmp_path / file)
        assert sum(t.nbytes for t in held.values()) <= 90 or list(held) == ["large"]
        assert {name for name, place in index["weight_map"].items() if place == file} == held.keys()
    source = open_source(tmp_path)
    assert all(torch.equal(source.entries[name].load(), tensor) for name, tensor in tensors.items())


def test_a_file_says_how_to_build_and_sample_it(tmp_path: Path) -> None:
    row = variant("wan_tiny")
    network = WanModel(**row.network)
    save(
        path := tmp_path / "a" / "b.safetensors",
        network,
        sampling=row.sampling,
        variant="wan_tiny",
        history=[{"a": 1}],
    )
    with safe_open(path, framework="pt") as file:
        stored = json.loads(file.metadata()["turbodiffusion"])
    assert (stored["version"], stored["kind"], stored["variant"]) == (1, "network", "wan_tiny")
    assert stored["config"] == network.config
    assert stored["history"] == [{"a": 1}]
    report = detect(path)
    assert (report.sampling, report.variant, report.format) == (row.sampling, "wan_tiny", "ours")


def test_saving_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for value in (1.0, 2.0):
        write_safetensors(path, {"a": Entry.of(torch.tensor(value))}, {})
    assert load_file(path)["a"] == 2
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_interrupted_write_leaves_the_old_file_and_no_other(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def fail() -> torch.Tensor:
        raise error

    entries = {"a": Entry.of(torch.ones(1000)), "b": Entry((1000,), torch.float32, fail)}
    with pytest.raises(UserError if error is OSError else error):
        write_safetensors(path, entries, {})
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(path.name, b"old")]


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from turbodiffusion.checkpoints.saving import write_safetensors, write_torch
from turbodiffusion.checkpoints.sources import Entry
from turbodiffusion.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
entries = {"a": Entry.of(torch.randn(1_000_000))}
for write in (lambda: write_safetensors(Path(sys.argv[1], "x.safetensors"), entries, {}),
              lambda: write_torch(Path(sys.argv[1], "x.pth"), entries)):
    try:
        write()
    except UserError as error:
        print(error)
"""


def test_a_write_that_hits_the_end_of_space_leaves_nothing(tmp_path: Path) -> None:
    # the limit on file sizes fails in the middle of a write, as a full disk does
    ran = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = ran.stdout.splitlines()
    assert len(lines) == 2
    assert all("could not be written" in line for line in lines)
    assert not list(tmp_path.iterdir())


def test_more_than_the_disk_holds_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="GB free"), appearing(tmp_path / "x", 10**18):
        pytest.fail("the block ran")


def test_a_folder_appears_whole_and_spares_foreign_files(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for text in ("one", "two"):
        with appearing_folder(folder) as part:
            (part / "a").write_text(text)
        assert (folder / "a").read_text() == text
    with pytest.raises(KeyboardInterrupt), appearing_folder(folder) as part:  # noqa: PT012
        (part / "a").write_text("three")
        raise KeyboardInterrupt
    (folder / "thesis").write_text("mine")
    with pytest.raises(UserError, match="also holds thesis"), appearing_folder(folder) as part:
        (part / "a").write_text("four")
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"a": "two", "thesis": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_module_of_another_kind_is_a_programming_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Linear"):
        save(tmp_path / "x.safetensors", torch.nn.Linear(2, 2))
