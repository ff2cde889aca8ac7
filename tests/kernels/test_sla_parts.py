"""The block map and the linear branch without a GPU: kernels in the interpreter, and no need of Triton."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, *command)
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False
    )


def test_cpu_needs_no_triton() -> None:
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"  # any import of it now raises
        "import torch\n"
        "from kernels.block_map import block_map\n"
        "from kernels.linear_attention import linear_attention\n"
        "q, k, v = torch.randn(3, 1, 1, 4, 64)\n"
        "block_map(q, k, block_q=2, block_k=2, ratio=0.5)\n"
        "linear_attention(q, k, v, 'softmax', torch.eye(64), torch.zeros(64))\n"
    )
    result = run("-c", code, TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["block_map", "linear_attention"])
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, pytest -m gpu runs the kernels themselves")
def test_kernels_in_the_interpreter(name: str) -> None:
    # in a process of its own: Triton interprets or compiles, one of the two in a process
    tests = f"tests/kernels/test_{name}_kernels.py"
    result = run("-m", "pytest", "-q", "-m", "gpu", tests, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stdout[-4000:]
    assert "passed" in result.stdout
