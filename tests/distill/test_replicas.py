import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill import replicas

ROOT = Path(__file__).resolve().parents[2]
RUN = ["train.py", "experiment=text_tiny", "debug=true", "steps=3", "held_out=2", "preview_every=100"]


def train(launcher: list[str], out: Path, *options: str) -> Path:
    """Run the caption reader for three steps, and return its last checkpoint."""
    command = [sys.executable, *launcher, *RUN, f"out={out}", *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "text_tiny" / "checkpoint" / "step-0000003"


@pytest.mark.dist
def test_two_ranks_train_as_one_that_accumulates_their_batches(tmp_path: Path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    together = train(torchrun, tmp_path / "together")
    alone = train([], tmp_path / "alone", "accumulate=2")
    for name in ("reader", "reader_ema"):
        ours, theirs = (load_file(run / f"{name}.safetensors") for run in (together, alone))
        for key, weight in theirs.items():
            # the same two gradients, averaged in fp32 in another order; Adam's first steps divide by their
            # size, so where one is near zero rounding decides its direction: at most lr = 1e-3 a step
            close = torch.isclose(ours[key], weight, rtol=1e-5, atol=1e-6)
            assert close.float().mean() > 0.99, key
    log = (tmp_path / "together" / "text_tiny" / "log.jsonl").read_text().splitlines()
    assert len(log) == 4  # three steps and the measures, from one of the ranks


def test_without_torchrun_there_is_one_rank_and_nothing_happens():
    with replicas.joined(torch.device("cpu")):
        assert (replicas.rank(), replicas.world_size()) == (0, 1)
        assert list(replicas.numbers(3, 2)) == [6, 7]
        assert replicas.from_first([1.5, 0.0], torch.device("cpu")) == [1.5, 0.0]
