import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill import replicas
from turbodiffusion.parallel import joined

ROOT = Path(__file__).resolve().parents[2]
RUN = ["train.py", "experiment=text_tiny", "debug=true", "steps=3", "held_out=2", "preview_every=100"]


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_that_torchrun_starts_write_one_log_and_one_checkpoint(tmp_path: Path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
    command = [*torchrun, *RUN, f"out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "text_tiny" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 3]  # the last are measures
    assert done.stdout.count("it reads") == 1
    assert [path.name for path in (tmp_path / "text_tiny" / "checkpoint").iterdir()] == ["step-0000003"]


def test_without_torchrun_there_is_one_rank_and_nothing_happens():
    with joined(torch.device("cpu")):
        assert (replicas.rank(), replicas.world_size()) == (0, 1)
        assert list(replicas.numbers(3, 2)) == [6, 7]
        assert replicas.from_first([1.5, 0.0], torch.device("cpu")) == [1.5, 0.0]
