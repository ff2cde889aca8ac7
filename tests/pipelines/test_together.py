"""infer.py started by torchrun.  That a shared video is right is tested in tests/parallel."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.command import generate
from turbodiffusion.pipelines.graphs import check_graph
from turbodiffusion.pipelines.together import check_parallel
from turbodiffusion.pipelines.video_io import read_video

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.dist
def test_two_processes_make_one_video_and_one_writes_it(family: Callable, tmp_path: Path) -> None:
    options = family("wan_tiny").options(out=str(tmp_path / "alone.mp4"))
    generate(options)
    names = ("ckpt", "vae", "text_encoder", "steps", "frames", "size", "text_cache", "prompt")
    words = [f"{name}={getattr(options, name)}" for name in names]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "infer.py", "parallel=cp", *words, f"out={tmp_path / 'shared.mp4'}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [str(tmp_path / "shared.mp4")]
    assert done.stderr.count("memory plan") == 1
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "shared")]
    assert [record["processes"] for record in records] == [1, 2]
    assert records[1]["options"]["parallel"] == "none"  # of the command that makes it alone
    ours, theirs = (read_video(tmp_path / f"{name}.mp4")[0].int() for name in ("shared", "alone"))
    # a value between two levels of 8 bits may fall to either, and the codec spreads it
    assert (ours - theirs).abs().max() <= 2
    assert theirs.float().std() > 10


def test_files_are_dealt_out_in_rows(
    family: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    options = family("wan_tiny").options(
        parallel="data",
        prompt=None,
        prompt_file=str(tmp_path / "prompts.txt"),
        num_samples=2,
        frames=1,
        steps=1,
    )
    monkeypatch.setenv("WORLD_SIZE", "3")
    made = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        generate(replace(options, out=str(tmp_path / str(rank))))
        made.append({path.stem for path in (tmp_path / str(rank)).glob("*.png")})
    assert made == [{"0000-a-cat_seed0"}, {"0000-a-cat_seed1"}, {"0001-a-dog_seed0", "0001-a-dog_seed1"}]


@pytest.mark.parametrize(
    ("changed", "processes", "said"),
    [
        ({"parallel": "tp"}, 2, "is not one of none, cp, data"),
        ({"parallel": "cp"}, 1, "torchrun --nproc-per-node=N"),
        ({"parallel": "none"}, 2, "2 processes would all make the same"),
        ({"parallel": "data", "evaluation": "tiny"}, 2, "leave parallel= away"),
    ],
)
def test_processes_that_would_not_share_the_work_are_refused(
    changed: dict, processes: int, said: str, family: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(UserError, match=said):
        check_parallel(family("wan_tiny").options(**changed))


def test_heads_are_counted_before_weights_are_read(family: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 processes can not share a network of 2 heads: take one of 1, 2"):
        generate(family("wan_tiny").options(parallel="cp"))


def test_shared_steps_are_not_recorded() -> None:
    assert not check_graph("auto", torch.device("cuda"), "none", shared=True)
    with pytest.raises(UserError, match="what processes tell each other"):
        check_graph("true", torch.device("cuda"), "none", shared=True)
