"""Runs that end and go on, for the tests of them: `python -m tests.distill.restarts CASE FOLDER`."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from distill.conditioning import Example
from distill.sharding import whole
from tests.distill.ranks import CPU, Noise, everything, make_trainer
from turbodiffusion.parallel import joined, rank

LONG = {"steps": 30, "save_every": 2, "log_every": 1}


def restarted(folder: Path) -> None:
    """Train, but for rank 1, which is killed at step 5 the first time; once more, whole."""

    def spoil(number: int, example: Example) -> Example:
        if number == 11 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return example

    with joined(CPU):
        data = Noise(spoil)
        trainer = make_trainer(folder / "killed", shard=2, data=data, save_every=2, async_save=True)
        (folder / "from").write_text(str(trainer.state.step))
        trainer.fit()
        make_trainer(folder / "whole", shard=2).fit()


def resharded(folder: Path) -> None:
    """What four ranks find in the checkpoint of FOLDER/broken, to four.pt."""
    with joined(CPU):
        found = {n: whole(v) for n, v in everything(make_trainer(folder / "broken", shard=4)).items()}
        if rank() == 0:
            torch.save(found, folder / "four.pt")


def killed(folder: Path) -> None:
    """Train alone, killed three times on the way, and once whole; the steps resumed from to kills.json.

    Both here, with as many threads: sums of floats depend on those.
    """
    moments, found = random.Random(0), []
    checkpoints, log = folder / "killed" / "checkpoint", folder / "killed" / "log.jsonl"
    while len(found) < 4:
        # a copy of this process, which has done nothing but import
        child = os.fork()
        if not child:
            make_trainer(folder / "killed", **LONG).fit()
            os._exit(0)
        found.append([path.name for path in checkpoints.glob("step-*")])
        if len(found) < 4:
            lines = _lines(log)
            while _lines(log) < lines + 3:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.3))
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    make_trainer(folder / "whole", **LONG).fit()
    (folder / "kills.json").write_text(json.dumps(found))


def _lines(log: Path) -> int:
    return log.read_text().count("\n") if log.exists() else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = {case.__name__: case for case in (restarted, resharded, killed)}
    cases[sys.argv[1]](Path(sys.argv[2]))
