import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distill.checkpoint import Saver, TrainState, resume_run, saved_runs
from turbodiffusion.errors import UserError


def weights(net: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {"net": dict(net.named_parameters())}


def test_nothing_saved_means_nothing_resumed(tmp_path: Path):
    state = TrainState()
    assert not resume_run(tmp_path, state, weights(nn.Linear(2, 2)))
    assert state.step == 0


def test_only_the_newest_checkpoint_is_kept(tmp_path: Path):
    for step in (1, 2):
        Saver(tmp_path).save(TrainState(step=step), weights(nn.Linear(2, 2)))
    assert [path.name for path in saved_runs(tmp_path)] == ["step-0000002"]


@contextmanager
def small_disk() -> Iterator[None]:
    """Have no file grow beyond 100 kB: a write fails in its middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("background", [False, True])
def test_full_disk_is_said_and_costs_no_more_than_the_save_at_hand(background: bool, tmp_path: Path):
    saver = Saver(tmp_path, background=background)
    saver.save(TrainState(step=1), weights(nn.Linear(2, 2)))
    saver.wait()

    def train() -> None:
        saver.save(TrainState(step=2), weights(nn.Linear(300, 300)))
        while True:
            saver.check()

    with small_disk(), pytest.raises(UserError, match=r"step-0000002 could not be written.*make room"):
        train()
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]
    net = nn.Linear(2, 2)
    assert resume_run(tmp_path, TrainState(), weights(net))
    Saver(tmp_path, background=background).save(TrainState(step=3), weights(net))


def test_folder_that_can_not_be_made_is_said(tmp_path: Path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match=r"run/step-0000001 could not be written \(Not a directory\)"):
        Saver(tmp_path / "run").save(TrainState(step=1), weights(nn.Linear(2, 2)))


def test_save_that_is_under_way_is_waited_for_before_the_next(tmp_path: Path):
    net, saver = nn.Linear(500, 500), Saver(tmp_path, background=True)
    for step in (1, 2):
        saver.save(TrainState(step=step), weights(net))
    assert [path.name for path in saved_runs(tmp_path)] == ["step-0000001"]
    kept = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.zero_()
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000002"]
    resume_run(tmp_path, TrainState(), weights(net))
    assert torch.equal(net.weight, kept)


def test_half_written_checkpoint_is_ignored_and_cleared(tmp_path: Path):
    net = nn.Linear(2, 2)
    Saver(tmp_path).save(TrainState(step=1), weights(net))
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "__0_0.distcp").write_bytes(b"half")
    state = TrainState()
    assert resume_run(tmp_path, state, weights(nn.Linear(2, 2)))
    assert state.step == 1
    Saver(tmp_path).save(TrainState(step=2), weights(net))
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000002"]


def test_optimiser_comes_back_exactly(tmp_path: Path):
    def make() -> tuple[nn.Module, TrainState]:
        net = nn.Linear(3, 3)
        return net, TrainState(optimizers={"net": torch.optim.AdamW(net.parameters(), lr=0.1)})

    net, state = make()
    for _ in range(2):
        net(torch.randn(4, 3)).sum().backward()
        state.optimizers["net"].step()
    Saver(tmp_path).save(state, weights(net))
    again, resumed = make()
    resume_run(tmp_path, resumed, weights(again))
    ours, theirs = (s.optimizers["net"].state_dict()["state"] for s in (resumed, state))
    for index, moments in theirs.items():
        for name, value in moments.items():
            assert torch.equal(ours[index][name], value)


def test_another_network_is_refused_by_the_names_that_differ(tmp_path: Path):
    Saver(tmp_path).save(TrainState(step=1), weights(nn.Linear(2, 2)))
    with pytest.raises(UserError, match=r"weight.*name="):
        resume_run(tmp_path, TrainState(), weights(nn.Linear(3, 2)))
