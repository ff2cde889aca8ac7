"""Networks whose tokens several processes share, against one process; ranks.py is what they run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distill.ranks import everything, make_trainer
from tests.parallel.ranks import STEPS, TRAINED

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
# fp32 sums of the ranks' sums, or products of matrices cut elsewhere: some roundings (6e-8) of the largest
EXACT = 1e-6
# of one weight alone, where larger terms may cancel
GRADIENT = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Started once: importing takes longer than all that is done."""
    path = tmp_path_factory.mktemp("context")
    command = [*TORCHRUN, "--nproc-per-node=4", "-m", "tests.parallel.ranks", str(path)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, dict[str, object]]]:
    return [json.loads((folder / f"rank{i}.json").read_text()) for i in range(4)]


@pytest.mark.dist
def test_velocity_tangent_and_gradients_are_those_of_one_process(ranks: list[dict]) -> None:
    for rank in ranks:
        assert len(rank["networks"]) == 5 * 2
        for case, errors in rank["networks"].items():
            assert errors.keys() == {"velocity", "tangent", "x", "context", "weights"}
            for kind, error in errors.items():
                assert error < (GRADIENT if kind == "weights" else EXACT), (case, kind)


@pytest.mark.dist
def test_attention_may_be_exchanged_later(ranks: list[dict]) -> None:
    assert all(rank["exchanged"] < EXACT for rank in ranks)


@pytest.mark.dist
def test_a_shared_video_is_that_of_one_process(ranks: list[dict]) -> None:
    # velocities are exact to 1e-6 of the largest, about 5; the VAE adds little
    assert all(rank["video"] < 1e-5 for rank in ranks)


@pytest.mark.dist
def test_heads_and_tokens_that_can_not_be_shared_are_refused(ranks: list[dict]) -> None:
    for rank in ranks:
        heads, tokens = rank["refused"]
        assert "2 processes can not share a network of 3 heads: take one of 1, 3" in heads
        assert "2 processes can not share 1 tokens" in tokens


@pytest.mark.dist
@pytest.mark.parametrize("case", TRAINED)
def test_teams_train_as_one_process_which_can_go_on(
    ranks: list[dict], folder: Path, tmp_path: Path, case: str
) -> None:
    alone = make_trainer(tmp_path, **TRAINED[case] | {"shard": 1}, accumulate=2, **STEPS)
    losses = {}
    for _ in range(STEPS["steps"]):
        alone.update()
        losses |= {f"{name} at {alone.state.step}": x.tolist() for name, x in alone.losses.items()}
    alone.fit()
    teams = [rank["losses"][case] for rank in ranks]
    # the ranks of a team have the same batches, noise and times; the teams have each their own
    assert (teams[0], teams[2]) == (teams[1], teams[3])
    assert not teams[0].keys() & teams[2].keys()
    assert teams[0] | teams[2] == {name: pytest.approx(loss, rel=GRADIENT) for name, loss in losses.items()}
    # before clipping, after which a wrong factor could not be seen
    norms = [grad_norms(path / "log.jsonl") for path in (folder / case, tmp_path)]
    assert norms[0] == pytest.approx(norms[1], rel=GRADIENT)
    ours, theirs = torch.load(folder / f"{case}.pt"), everything(alone)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("student_ema/") for name in ours)
    for name, weight in theirs.items():
        # gradients are at most 1 after clipping, and the rate is 0.01
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=EXACT)
    again = make_trainer(folder / case, **TRAINED[case] | {"shard": 1}, accumulate=2, **STEPS)
    assert again.state.step == STEPS["steps"]
    assert all(torch.equal(weight, ours[name]) for name, weight in everything(again).items())


def grad_norms(log: Path) -> list[float]:
    lines = map(json.loads, log.read_text().splitlines())
    found = [value for line in lines for name, value in line.items() if name.startswith("grad_norm/")]
    assert len(found) == STEPS["steps"]
    assert min(found) > 1
    return found
