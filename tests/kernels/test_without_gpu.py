"""Kernels without a GPU: in Triton's interpreter, and no need of Triton where their twins run."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SLOW = (
    "block_map",
    "block_sparse",
    "block_sparse_linear",
    "linear_attention",
    "int8_linear",
    "norms",
    "pixels",
    "causal_conv",
)


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: Triton interprets or compiles, one of the two in a process."""
    command = (sys.executable, *command)
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_cpu_needs_no_triton() -> None:
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"  # any import of it now raises
        "import torch\n"
        "from kernels.causal_conv import causal_conv\n"
        "from kernels.flash_jvp import attention\n"
        "from kernels.block_map import block_map\n"
        "from kernels.block_sparse import sparse_attention\n"
        "from kernels.block_sparse_int8 import sparse_attention_int8\n"
        "from kernels.block_sparse_linear import sparse_linear_attention\n"
        "from kernels.int8_linear import int8_linear, quantise_rows\n"
        "from kernels.linear_attention import linear_attention\n"
        "from kernels.norms import add_gated\n"
        "from kernels.pixels import enlarge\n"
        "q, k, v = torch.randn(3, 1, 1, 4, 64)\n"
        "attention(q, k, v)\n"
        "index = block_map(q, k, block_q=64, block_k=64, ratio=0.5)\n"
        "for op in (sparse_attention, sparse_attention_int8):\n"
        "    op(q, k, v, index, block_q=64, block_k=64)\n"
        "projected = ('softmax', torch.eye(64), torch.zeros(64))\n"
        "linear_attention(q, k, v, *projected)\n"
        "sparse_linear_attention(q, k, v, index, *projected, block_q=64, block_k=64)\n"
        "int8_linear(q, *quantise_rows(torch.eye(64)))\n"
        "add_gated(q[0], k[0], v[0])\n"
        "enlarge(q.unsqueeze(0))\n"
        "causal_conv(torch.randn(1, 32, 3, 4, 4), torch.randn(32, 32, 3, 3, 3))\n"
    )
    result = run("-c", code, TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["flash_jvp", *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)])
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, pytest -m gpu runs the kernels themselves")
def test_kernels_in_the_interpreter(name: str) -> None:
    result = run(
        "-m", "pytest", "-q", "-m", "gpu", f"tests/kernels/test_{name}_kernels.py", TRITON_INTERPRET="1"
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert "passed" in result.stdout
