"""Run by an interpreter that has vbench, to look at videos one by one with one of its dimensions.

    PYTHON upstream_driver.py DIMENSION [DIMENSION...]

imports them.  Standard input may then have lines of JSON for the first: {device, submodules}, and one a
video, as vbench lists prompts; standard output gets a line a video: {results} or {failed}.  What vbench
prints goes to standard error.
"""

import importlib
import json
import os
import sys
import tempfile
import traceback
from types import ModuleType
from typing import IO


def serve(module: ModuleType, name: str, device: str, submodules: dict, answers: IO[str]) -> None:
    """Let vbench load its network, with ourselves in the place of its loop over all videos."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # detectron2 knows no other than the current one
    look = getattr(module, name)

    def one_by_one(model: object, _: list, device: torch.device) -> tuple[float, list]:
        for line in sys.stdin:
            try:
                answer = {"results": look(model, [json.loads(line)], device)[1]}
            except Exception as error:  # whatever is wrong with one video
                if name == "color" and isinstance(error, ZeroDivisionError):
                    answer = {"results": []}  # divided by the number of videos that show the object
                else:
                    traceback.print_exc()
                    answer = {"failed": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        return 0.0, []

    setattr(module, name, one_by_one)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as prompts:
        prompts.write("[]")
        prompts.flush()
        getattr(module, f"compute_{name}")(prompts.name, torch.device(device), submodules)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules must not stand in for others
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)
        first, *_ = [importlib.import_module(f"vbench.{each}") for each in sys.argv[1:]]
        if setup := sys.stdin.readline():
            serve(first, sys.argv[1], **json.loads(setup), answers=channel)
