"""Python in processes of its own: Triton interprets or compiles, one of the two in a process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="without Triton there are no kernels; with a GPU, pytest -m gpu runs the kernels themselves",
)


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )


def interpret(path: str) -> None:
    """Run a file of tests with the mark gpu, on a CPU."""
    result = run("-m", "pytest", "-q", "-m", "gpu", path, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-4000:]
    assert "passed" in result.stdout
