"""Two processes against one, and runs that are killed; ranks.py and restarts.py are what they run."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from distill.objective import nothing
from distill.recipes import Hardware
from tests.distill.ranks import (
    CPU,
    STEADY,
    everything,
    make_trainer,
    read_checkpoint,
    save_both_ways,
    tiny_network,
)
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel

ROOT = Path(__file__).resolve().parents[2]
RESTARTS = ("-m", "tests.distill.restarts")


@dataclass(frozen=True)
class Ended:
    """What two processes left behind."""

    folder: Path
    ranks: list[dict[str, dict[str, object]]]
    errors: str
    seconds: float  # from the last result to the end


def start(*command: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=300,
    )


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    return start("-m", "torch.distributed.run", "--standalone", *command)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Started once: importing takes longer than all that is done."""
    folder = tmp_path_factory.mktemp("together")
    done = torchrun("--nproc-per-node=2", "-m", "tests.distill.ranks", str(folder))
    files = [folder / f"rank{i}.json" for i in range(2)]
    assert all(file.exists() for file in files), done.stdout + done.stderr
    seconds = time.time() - max(file.stat().st_mtime for file in files)
    assert done.returncode != 0
    return Ended(folder, [json.loads(file.read_text()) for file in files], done.stderr, seconds)


@pytest.mark.dist
@pytest.mark.parametrize(("shard", "optim"), [(1, "descent"), (2, "descent"), (2, "muon")])
def test_two_ranks_train_as_one_that_accumulates_their_batches(
    ended: Ended, shard: int, optim: str, tmp_path: Path
):
    alone = make_trainer(tmp_path, optim=STEADY[optim], steps=5, accumulate=2)
    alone.fit()
    ours, theirs = torch.load(ended.folder / f"equal-{shard}-{optim}.pt"), everything(alone)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("student_ema/") for name in ours)
    for name, weight in theirs.items():
        # the same fp32 sums in another order, each at most 1 after clipping, times a rate of 0.01; or times
        # 0.001 and 485, by which Muon's five rounds can enlarge what is next to nothing
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-6)
    start = dict(tiny_network().named_parameters())
    assert max((ours[f"student/{name}"] - weight).abs().max().item() for name, weight in start.items()) > 1e-3


@pytest.mark.dist
def test_sharded_run_resumes_bit_for_bit_with_every_rank_s_moments(ended: Ended):
    results = [rank["resume"] for rank in ended.ranks]
    for result in results:
        assert (result["at"], result["wrong"]) == (3, [])
        for role in ("student", "critic"):
            for kind in ("exp_avg", "exp_avg_sq"):
                assert f"{role}/blocks.1.ffn.0.weight/{kind}" in result["names"]
        assert "student_ema/head.head.weight" in result["names"]
    # each has its own half of them
    assert results[0]["moments"] != results[1]["moments"]


@pytest.mark.dist
def test_checkpoint_of_two_shards_resumes_on_one_process_and_then_on_four(ended: Ended):
    alone = make_trainer(ended.folder / "broken")
    assert alone.state.step == 6
    ours, theirs = everything(alone), torch.load(ended.folder / "whole.pt")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    alone.update()
    alone.save()
    done = torchrun("--nproc-per-node=4", *RESTARTS, "resharded", str(ended.folder))
    assert done.returncode == 0, done.stderr
    ours, theirs = torch.load(ended.folder / "four.pt"), everything(alone)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


@pytest.mark.dist
@pytest.mark.parametrize("processes", [1, 2])
def test_saving_in_the_background_writes_the_same_files(processes: int, tmp_path: Path, request):
    if processes == 1:
        folder = tmp_path
        save_both_ways(folder, 1)
    else:
        folder = request.getfixturevalue("ended").folder
    sync, background = (folder / name / "step-0000003" for name in ("sync", "async"))
    names = {path.name for path in sync.iterdir()}
    assert {".metadata", "counters.json", *(f"__{i}_0.distcp" for i in range(processes))} == names
    assert {path.name for path in background.iterdir()} == names
    for name in names - {".metadata"}:
        assert (sync / name).read_bytes() == (background / name).read_bytes()
    ours, theirs = (dcp.FileSystemReader(path).read_metadata() for path in (background, sync))
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


@pytest.mark.dist
def test_sharded_average_is_shipped_whole(ended: Ended):
    shipped = load_file(ended.folder / "whole" / "student.safetensors")
    averages = torch.load(ended.folder / "whole.pt")
    assert shipped.keys() == tiny_network().state_dict().keys()
    for name, weight in shipped.items():
        dtype = torch.float32 if WanModel.is_fp32(name) else torch.bfloat16
        assert torch.equal(weight, averages[f"student_ema/{name}"].to(dtype))
        assert weight.dtype == dtype


@pytest.mark.dist
def test_sharded_gradients_are_clipped_by_the_norm_of_all(ended: Ended):
    for rank in ended.ranks:
        assert rank["clip"]["before"] > 1
        # PyTorch adds 1e-6 to a norm far above 1; fp32 sums of two ranks
        assert rank["clip"]["after"] == pytest.approx(1e-2, rel=1e-5)


@pytest.mark.dist
def test_dual_numbers_pass_a_sharded_network_and_gradients_follow(ended: Ended):
    for rank in ended.ranks:
        # the same products of the same gathered weights
        assert rank["tangents"]["tangent"] == 0
        # gradients below 1, summed in another order
        assert rank["tangents"]["gradient"] < 1e-6


@pytest.mark.dist
def test_nan_on_one_rank_stops_all_before_the_step_and_names_it(ended: Ended):
    for rank in ended.ranks:
        assert "norm of student is nan at step 4" in rank["poison"]["error"]
        assert "loss/consistency of batch 9 on rank 1" in rank["poison"]["error"]
    (last,) = (ended.folder / "poison" / "checkpoint").glob("step-*")
    assert last.name == "step-0000003"
    assert all(value.isfinite().all() for value in read_checkpoint(last).values())


@pytest.mark.dist
def test_signal_that_reaches_the_ranks_at_different_times_stops_them_at_the_same_step(ended: Ended):
    # the first rank's counts, after the next step
    assert [rank["interrupt"] for rank in ended.ranks] == [4, 4]


@pytest.mark.dist
def test_error_on_one_rank_ends_the_run_with_its_words_alone(ended: Ended):
    assert ended.errors.startswith("[rank 1] shard 7 is torn\n")
    # the rest is torchrun's
    assert "[rank0]" not in ended.errors
    assert ended.errors.count("Traceback") == 1
    # the other rank sees the connection close; torchrun looks once in 0.1 s, a loaded machine needs a while
    assert ended.seconds < 20
    (last,) = (ended.folder / "torn" / "checkpoint").glob("step-*")
    assert last.name == "step-0000002"


@pytest.mark.dist
@pytest.mark.slow
def test_killed_run_ends_as_an_uninterrupted_one(tmp_path: Path):
    done = start(*RESTARTS, "killed", str(tmp_path))
    assert done.returncode == 0, done.stderr
    resumed = json.loads((tmp_path / "kills.json").read_text())
    # killed on the way each time, and never left without a checkpoint
    assert resumed[0] == []
    assert all(len(found) in (1, 2) for found in resumed[1:])
    assert resumed == sorted(resumed)
    assert "step-0000030" not in resumed[-1]
    ours, theirs = (
        read_checkpoint(tmp_path / run / "checkpoint" / "step-0000030") for run in ("killed", "whole")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


@pytest.mark.dist
def test_run_with_a_killed_rank_is_started_again_and_ends_as_an_uninterrupted_one(tmp_path: Path):
    done = torchrun("--nproc-per-node=2", "--max-restarts=1", *RESTARTS, "restarted", str(tmp_path))
    assert done.returncode == 0, done.stderr
    # killed at step 5, maybe before the checkpoint of step 4 was in its place
    assert (tmp_path / "from").read_text() in ("2", "4")
    ours, theirs = (
        read_checkpoint(tmp_path / run / "checkpoint" / "step-0000006") for run in ("killed", "whole")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


def test_ranks_that_can_not_be_split_and_networks_that_are_not_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="shard=3 does not divide the 4 processes"):
        Hardware.named("cpu", precision="float32", compile=False, shard=3, remat="none")
    with pytest.raises(UserError, match="context=3 does not divide the 4 processes"):
        Hardware.named("cpu", precision="float32", compile=False, shard=2, remat="none", context=3)
    for counts in ((2, 1), (1, 2)):
        with pytest.raises(UserError, match="only distillation"):
            Hardware(CPU, torch.float32, None, *counts).prepare(tiny_network(), nothing, [])
