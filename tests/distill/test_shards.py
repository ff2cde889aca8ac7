"""The stream of batches from shards: each sample once an epoch on any ranks, and entered anywhere."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from distill.conditioning import Example
from distill.shard_files import WRITERS, Sample
from distill.shards import ShardedClips
from turbodiffusion.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SIZES = (5, 1, 7)  # samples a shard
N = sum(SIZES)


def make_sample(number: int, *, frames: int = 3, bad: bool = False, clips: bool = True) -> Sample:
    """Everything in it is `number`, which bf16 holds exactly up to 256."""
    context = torch.full((6, 4), float(number)).bfloat16()
    latents = torch.full((2, frames, 2, 2), float("nan") if bad else float(number)).bfloat16()
    return Sample(f"prompt {number}", context, latents if clips else None)


def write(folder: Path, format: str = "tar", *, bad: tuple[int, ...] = (), clips: bool = True) -> Path:
    """Samples 0 ... 12 in three shards."""
    folder.mkdir(exist_ok=True)
    start = 0
    for i, size in enumerate(SIZES):
        numbers = range(start, start + size)
        samples = [(f"{n:09d}", make_sample(n, bad=n in bad, clips=clips)) for n in numbers]
        WRITERS[format](folder / f"shard_{i:06d}.{format}", samples)
        start += size
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("shards"))


def clips(folder: Path, **changed: object) -> ShardedClips:
    return ShardedClips(**({"path": str(folder), "count": 2, "seed": 3, "ahead": 1} | changed))


def numbers(example: Example) -> list[int]:
    return example.latents[:, 0, 0, 0, 0].int().tolist()


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("ahead", [0, 3])
def test_ranks_together_see_each_sample_once_an_epoch(
    format: str, world: int, count: int, ahead: int, tmp_path: Path
) -> None:
    """As many batches as make 3 epochs on all ranks, whatever the ranks, the batch and the threads."""
    folder = write(tmp_path, format)
    ranks = [clips(folder, count=count, every=world, ahead=ahead) for _ in range(world)]
    seen = []
    while len(seen) < 3 * N:
        first = len(seen) // count
        seen += [n for rank, stream in enumerate(ranks) for n in numbers(stream.batch(first + rank))]
    epochs = [seen[i * N : (i + 1) * N] for i in range(3)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_processes_of_one_rank_see_the_same_whatever_reads_for_them(folder: Path) -> None:
    peers = [clips(folder, every=2, ahead=ahead) for ahead in (0, 1, 4)]
    for number in range(1, 17, 2):
        first, *others = (numbers(peer.batch(number)) for peer in peers)
        assert all(other == first for other in others)


def test_a_new_stream_goes_on_in_the_middle_of_an_epoch(folder: Path) -> None:
    whole = clips(folder)
    batches = [numbers(whole.batch(number)) for number in range(9)]
    for start in (1, 4, 7):
        again = clips(folder)
        assert [numbers(again.batch(number)) for number in range(start, 9)] == batches[start:]


def test_batches_can_be_asked_for_in_any_order_and_again(folder: Path) -> None:
    stream = clips(folder, ahead=2)
    batches = {number: numbers(stream.batch(number)) for number in (7, 0, 3, 4, 2, 4, 100)}
    for number, batch in batches.items():
        assert numbers(clips(folder).batch(number)) == batch


def test_seed_decides_the_order(folder: Path) -> None:
    one, other = ([numbers(clips(folder, seed=seed).batch(number)) for number in range(3)] for seed in (3, 4))
    assert one != other


def test_an_example_is_what_was_stored(folder: Path) -> None:
    example = clips(folder, count=4).batch(0)
    assert (example.latents.shape, example.context.shape) == ((4, 2, 3, 2, 2), (4, 6, 4))
    assert (example.latents.dtype, example.has_clips) == (torch.bfloat16, True)
    assert example.condition is None
    assert example.clip is None
    assert example.context[:, 0, 0].int().tolist() == numbers(example)


def test_frames_are_cut_and_too_few_are_refused(folder: Path, tmp_path: Path) -> None:
    assert clips(folder, frames=2).batch(0).latents.shape[2] == 2
    with pytest.raises(
        UserError, match=r"shard_00000\d\.tar, sample \d{9} has 3 latent frames, wanted frames=4"
    ):
        clips(folder, frames=4).batch(0)
    condition = torch.arange(3.0).view(1, 3, 1, 1).bfloat16()
    known = Sample("a", torch.ones(2, 2), torch.ones(1, 3, 1, 1), condition, torch.ones(3, 2))
    WRITERS["safetensors"](tmp_path / "shard_0.safetensors", [("0", known)])
    example = clips(tmp_path, count=1, frames=2).batch(0)
    assert example.condition is not None
    assert example.condition.flatten().tolist() == [0, 1]
    assert example.clip is not None


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("has_clips", [False, True])
def test_texts_alone_come_with_zeros_for_clips(format: str, has_clips: bool, tmp_path: Path) -> None:
    folder = write(tmp_path, format, bad=(4,), clips=has_clips)
    # sample 4 has a poisoned clip, which is not even read
    stream = clips(folder, count=N, text_only=True, latent_shape=[2, 5, 4, 4])
    example = stream.batch(0)
    assert not example.has_clips
    assert torch.equal(example.latents, torch.zeros(N, 2, 5, 4, 4).bfloat16())
    assert sorted(example.context[:, 0, 0].int().tolist()) == list(range(N))


def first_epoch(stream: ShardedClips) -> list[int]:
    return [n for number in range(N) for n in numbers(stream.batch(number))]


def test_a_poisoned_sample_stops_the_batch_that_would_hold_it_and_no_other(tmp_path: Path) -> None:
    stream = clips(write(tmp_path, bad=(6,)), count=1, ahead=3)
    order = first_epoch(clips(write(tmp_path / "good"), count=1))
    for number, wanted in enumerate(order):
        if wanted == 6:
            with pytest.raises(UserError, match=r"shard_000002\.tar, sample 000000006: latents holds NaN"):
                stream.batch(number)
        else:
            assert numbers(stream.batch(number)) == [wanted]


def test_skip_broken_takes_the_next_sample_instead_and_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path, bad=(6, 12))
    with pytest.warns(UserWarning, match="skipped") as said:
        seen = first_epoch(clips(folder, count=1, skip_broken=True, ahead=0))
    assert {str(one.message).partition("sample ")[2][:9] for one in said} == {"000000006", "000000012"}
    # 12 is the last: the first takes its place
    assert Counter(seen) == Counter([*(n for n in range(N) if n not in (6, 12)), 7, 0])
    hopeless = clips(write(tmp_path / "all", bad=tuple(range(N))), skip_broken=True, ahead=0)
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(UserError, match="none of the 13"):
        hopeless.batch(0)


def test_a_sample_without_all_members_is_refused_or_the_next_one_taken(tmp_path: Path) -> None:
    samples = [("13", make_sample(13, clips=False)), ("14", make_sample(14))]
    WRITERS["tar"](tmp_path / "shard_000003.tar", samples)
    with pytest.raises(UserError, match=r"shard_000003\.tar, sample 13: \.latent\.pt is missing"):
        clips(tmp_path).batch(0)
    with pytest.warns(UserWarning, match="sample 13"):
        assert numbers(clips(tmp_path, skip_broken=True, ahead=0).batch(0)) == [14, 14]


def test_a_batch_of_two_kinds_is_refused(tmp_path: Path) -> None:
    WRITERS["tar"](tmp_path / "shard_0.tar", [("0", make_sample(0)), ("1", make_sample(1, frames=2))])
    with pytest.raises(UserError, match=r"sample \d holds .* but .*sample \d"):
        clips(tmp_path).batch(0)


WRONG = {
    "count": ({"count": 0}, "count=0"),
    "every": ({"every": 0}, "every=0: it must be at least 1"),
    "ahead": ({"ahead": -1}, "ahead=-1"),
    "frames": ({"frames": 0}, "frames=0"),
    "text without a shape": ({"text_only": True}, "latent_shape"),
    "a shape without text": ({"latent_shape": [1, 1, 1, 1]}, "latent_shape"),
    "nothing there": ({"path": "nowhere"}, "no shards"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_options_are_refused(wrong: str, folder: Path) -> None:
    changed, part = WRONG[wrong]
    with pytest.raises(UserError, match=part):
        clips(folder, **changed)


def test_the_config_builds_the_stream(folder: Path) -> None:
    cfg = OmegaConf.load(ROOT / "configs" / "data" / "shards.yaml")
    cfg = OmegaConf.merge({"batch": 2, "seed": 3, "data": cfg}, {"data": {"path": str(folder)}})
    stream = instantiate(cfg.data)(device=torch.device("cpu"), every=2)
    assert numbers(stream.batch(1)) == numbers(clips(folder).batch(1))


def test_every_tensor_is_on_the_device(folder: Path) -> None:
    example = clips(folder, device="meta").batch(0)
    tensors = [x for x in vars(example).values() if isinstance(x, Tensor)]
    assert len(tensors) == 2
    assert all(x.is_meta for x in tensors)
