"""The two layouts of shards: what is written is read, by us and by others, and damage is named."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import webdataset
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.shard_files import (
    SHARDS,
    WRITERS,
    Sample,
    TarShard,
    find_shards,
    read_context,
    write_context,
    write_safetensors,
    write_tar,
)
from turbodiffusion.errors import UserError

Write = Callable[[Path, list[tuple[str, Sample]]], None]


def sample(number: int, *, picture: bool = False, clips: bool = True) -> tuple[str, Sample]:
    """Sample `number`: a prompt of 3 + number rows of 12, and latents that begin with the number."""
    rng = torch.Generator().manual_seed(number)
    context = torch.zeros(12, 8)
    context[: 3 + number] = torch.randn(3 + number, 8, generator=rng)
    latents = torch.randn(4, 3, 2, 2, generator=rng)
    latents[0, 0, 0, 0] = number
    known = {"condition": torch.randn(5, 3, 2, 2, generator=rng), "clip": torch.randn(7, 6, generator=rng)}
    tensors = {"context": context} | ({"latents": latents} if clips else {}) | (known if picture else {})
    text = f"a cat, number {number}: «naïve» 猫"
    return f"{number:09d}", Sample(text, **{name: x.bfloat16() for name, x in tensors.items()})


def is_same(one: Sample, other: Sample) -> bool:
    """To the bit."""
    a, b = one.tensors(), other.tensors()
    return (
        one.prompt == other.prompt
        and a.keys() == b.keys()
        and all(torch.equal(a[name].view(torch.int16), b[name].view(torch.int16)) for name in a)
    )


def stored(x: Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(x, file)
    return file.getvalue()


def members(number: int) -> dict[str, bytes | str]:
    """A sample as webdataset writes it."""
    key, made = sample(number)
    tensors = {"latent.pt": stored(made.latents), "embed.pt": stored(made.context)}
    return {"__key__": key, **tensors, "prompt.txt": made.prompt}


def published(path: Path, *samples: dict[str, bytes | str]) -> Path:
    """A shard in the published layout, by webdataset's own writer."""
    with webdataset.TarWriter(str(path)) as writer:
        for one in samples:
            writer.write(one)
    return path


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("picture", [False, True])
def test_what_is_written_is_read_to_the_bit_in_any_order(format: str, picture: bool, tmp_path: Path) -> None:
    path = tmp_path / f"shard_000000.{format}"
    written = [sample(i, picture=picture) for i in range(4)]
    WRITERS[format](path, written)
    shard = SHARDS[path.suffix](path)
    assert shard.keys == [key for key, _ in written]
    for number in (2, 0, 3, 1):
        assert is_same(shard.read(number), written[number][1])


@pytest.mark.parametrize("format", WRITERS)
def test_texts_alone_are_written_and_read(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"shard_000000.{format}"
    written = [sample(i, clips=False) for i in range(2)]
    WRITERS[format](path, written)
    assert is_same(SHARDS[path.suffix](path, text_only=True).read(1), written[1][1])


def test_a_tar_by_webdataset_is_read(tmp_path: Path) -> None:
    path = published(tmp_path / "shard_000000.tar", *(members(i) for i in range(3)))
    shard = TarShard(path)
    assert all(is_same(shard.read(i), sample(i)[1]) for i in range(3))


def test_webdataset_reads_our_tar(tmp_path: Path) -> None:
    write_tar(tmp_path / "shard_000000.tar", [sample(i) for i in range(3)])
    read = list(webdataset.WebDataset(str(tmp_path / "shard_000000.tar"), shardshuffle=False))
    assert [one["__key__"] for one in read] == ["000000000", "000000001", "000000002"]
    for i, one in enumerate(read):
        latents = torch.load(io.BytesIO(one["latent.pt"]), weights_only=True)
        context = torch.load(io.BytesIO(one["embed.pt"]), weights_only=True)
        assert is_same(Sample(one["prompt.txt"].decode(), context, latents), sample(i)[1])


def test_members_hold_their_own_tensor_only(tmp_path: Path) -> None:
    whole = torch.zeros(100, 12, 8, dtype=torch.bfloat16)
    write_tar(tmp_path / "a.tar", [("0", Sample("a", whole[3]))])
    # 192 bytes of numbers, a pickle of some 1.1 KB and the tar's blocks; the whole would take 19 KB
    assert (tmp_path / "a.tar").stat().st_size <= 10240


def test_safetensors_hold_no_padding(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", [sample(i) for i in range(3)])
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors["lengths"].tolist() == [3, 4, 5]
    assert tensors["context"].shape == (12, 8)
    assert tensors["latents"].shape == (3, 4, 3, 2, 2)


def test_keys_may_have_folders_and_dots_do_not_part_them(tmp_path: Path) -> None:
    one = members(0) | {"__key__": "part.1/000000007"}
    assert TarShard(published(tmp_path / "a.tar", one)).keys == ["part.1/000000007"]


@pytest.mark.parametrize("format", WRITERS)
def test_a_truncated_shard_is_named_wherever_it_ends(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"shard_000000.{format}"
    WRITERS[format](path, [sample(i) for i in range(2)])
    whole = path.read_bytes()
    # a tar ends in two empty blocks, padded to 10 KB: one must be there, whatever comes after is no loss
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512 if format == "tar" else len(whole) - 1
    for size in (*range(0, end, 500), end):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="shard_000000"):
            SHARDS[path.suffix](path)


def test_a_missing_member_is_named_and_the_others_stay(tmp_path: Path) -> None:
    short = members(1)
    del short["embed.pt"]
    shard = TarShard(published(tmp_path / "a.tar", members(0), short, members(2)))
    with pytest.raises(UserError, match=r"a\.tar, sample 000000001: \.embed\.pt is missing"):
        shard.read(1)
    assert is_same(shard.read(2), sample(2)[1])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("open('trace', 'w').close()",)


def evil() -> bytes:
    file = io.BytesIO()
    torch.save(Evil(), file)
    return file.getvalue()


DAMAGED = {
    "NaN": stored(torch.full((4, 3, 2, 2), float("nan")).bfloat16()),
    "infinity": stored(torch.full((4, 3, 2, 2), float("inf")).bfloat16()),
    "three dimensions": stored(torch.zeros(4, 3, 2)),
    "whole numbers": stored(torch.zeros(4, 3, 2, 2, dtype=torch.int64)),
    "half a file": stored(torch.zeros(4, 3, 2, 2))[:600],
    "nothing": b"",
    "code": evil(),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_member_names_file_and_sample(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = published(tmp_path / "a.tar", members(0), members(1) | {"latent.pt": DAMAGED[damage]})
    shard = TarShard(path)
    assert is_same(shard.read(0), sample(0)[1])
    with pytest.raises(UserError, match=r"a\.tar, sample 000000001"):
        shard.read(1)
    assert not Path("trace").exists()


def test_safetensors_of_another_kind_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no shard"):
        SHARDS[".safetensors"](tmp_path / "a.safetensors")
    write_safetensors(tmp_path / "b.safetensors", [sample(0, clips=False)])
    with pytest.raises(UserError, match="text_only=true"):
        SHARDS[".safetensors"](tmp_path / "b.safetensors")


def test_shards_are_found_sorted_in_folders_and_by_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "set [1]"
    folder.mkdir()
    names = [
        "shard_000010.tar",
        "shard_000002.tar",
        "negative.safetensors",
        "data.json",
        ".shard_0.tar.1.part",
    ]
    for name in names:
        (folder / name).touch()
    assert [path.name for path in find_shards(str(folder))] == ["shard_000002.tar", "shard_000010.tar"]
    assert len(find_shards(str(tmp_path / "*" / "shard_*0.tar"))) == 1
    with pytest.raises(UserError, match="no shards"):
        find_shards(str(tmp_path / "none"))


def test_an_embedding_is_read_from_our_file_and_from_a_published_one(tmp_path: Path) -> None:
    context = sample(0)[1].context
    write_context(tmp_path / "a.safetensors", context, "ugly 丑")
    torch.save(context, tmp_path / "a.pt")
    assert torch.equal(read_context(tmp_path / "a.safetensors"), context)
    assert torch.equal(read_context(tmp_path / "a.pt"), context)
    save_file({"other": context}, tmp_path / "b.safetensors")
    (tmp_path / "c.pt").write_bytes(b"no")
    (tmp_path / "d.safetensors").write_bytes(b"no")
    for name in ("b.safetensors", "c.pt", "d.safetensors", "e.pt"):
        with pytest.raises(UserError, match=name):
            read_context(tmp_path / name)


def test_the_metadata_of_a_shard_is_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, [sample(0)])
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    shard = json.loads(header["__metadata__"]["shard"])
    assert shard == {"keys": ["000000000"], "prompts": [sample(0)[1].prompt], "text_length": 12}
