"""Autoencoders whose rows several processes share, against one process; band_ranks.py is what they run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.band_ranks import SIZES

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
# computed in fp64, so that convolutions of another height round far below; results are rounded to fp32,
# at 1.2e-7 where they are 1 to 2, and may fall to either side
EXACT = 2.5e-7


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    path = tmp_path_factory.mktemp("bands")
    command = [*TORCHRUN, "--nproc-per-node=4", "-m", "tests.parallel.band_ranks", str(path)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((path / f"rank{i}.json").read_text()) for i in range(4)]


@pytest.mark.dist
def test_frames_and_latents_are_those_of_one_process(ranks: list[dict]) -> None:
    for rank in ranks:
        assert len(rank["errors"]) == 10 * 2 * 2
        for case, error in rank["errors"].items():
            assert error < EXACT, case


@pytest.mark.dist
def test_each_process_has_its_rows_but_all_where_they_are_few(ranks: list[dict]) -> None:
    shared = {"uneven": [3, 2, 2, 2], "low": [3, 3, 3, 3]}
    assert shared.keys() == SIZES.keys()
    for size, rows in shared.items():
        # decoding goes by single latent frames, and so does encoding what was decoded
        steps = 2 * SIZES[size][0]
        assert [rank["rows"][size] for rank in ranks] == [[own] * steps for own in rows]


@pytest.mark.dist
def test_all_take_as_many_frames_at_a_time_as_the_smallest_memory_has_room_for(ranks: list[dict]) -> None:
    assert [rank["chunks"] for rank in ranks] == [[5, 5]] * 4


@pytest.mark.dist
def test_gradients_are_refused(ranks: list[dict]) -> None:
    assert all("has no gradients: use torch.no_grad()" in rank["refused"] for rank in ranks)
