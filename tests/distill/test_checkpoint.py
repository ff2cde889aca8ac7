from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distill.checkpoint import TrainState, resume_run, save_run, saved_runs
from turbodiffusion.errors import UserError


def weights(net: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {"net": dict(net.named_parameters())}


def test_nothing_saved_means_nothing_resumed(tmp_path: Path):
    state = TrainState()
    assert not resume_run(tmp_path, state, weights(nn.Linear(2, 2)))
    assert state.step == 0


def test_only_the_newest_checkpoint_is_kept(tmp_path: Path):
    for step in (1, 2):
        save_run(tmp_path, TrainState(step=step), weights(nn.Linear(2, 2)))
    assert [path.name for path in saved_runs(tmp_path)] == ["step-0000002"]


def test_half_written_checkpoint_is_ignored_and_cleared(tmp_path: Path):
    net = nn.Linear(2, 2)
    save_run(tmp_path, TrainState(step=1), weights(net))
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "__0_0.distcp").write_bytes(b"half")
    state = TrainState()
    assert resume_run(tmp_path, state, weights(nn.Linear(2, 2)))
    assert state.step == 1
    save_run(tmp_path, TrainState(step=2), weights(net))
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000002"]


def test_optimiser_comes_back_exactly(tmp_path: Path):
    def make() -> tuple[nn.Module, TrainState]:
        net = nn.Linear(3, 3)
        return net, TrainState(optimizers={"net": torch.optim.AdamW(net.parameters(), lr=0.1)})

    net, state = make()
    for _ in range(2):
        net(torch.randn(4, 3)).sum().backward()
        state.optimizers["net"].step()
    save_run(tmp_path, state, weights(net))
    again, resumed = make()
    resume_run(tmp_path, resumed, weights(again))
    ours, theirs = (s.optimizers["net"].state_dict()["state"] for s in (resumed, state))
    for index, moments in theirs.items():
        for name, value in moments.items():
            assert torch.equal(ours[index][name], value)


def test_another_network_is_refused_by_the_names_that_differ(tmp_path: Path):
    save_run(tmp_path, TrainState(step=1), weights(nn.Linear(2, 2)))
    with pytest.raises(UserError, match=r"weight.*name="):
        resume_run(tmp_path, TrainState(), weights(nn.Linear(3, 2)))
