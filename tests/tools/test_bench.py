"""Benchmarks of real-size networks, at the smallest size and on a CPU."""

import importlib
import pkgutil
import sys

import pytest
import torch

from tools import bench
from tools.bench import sla_step
from tools.bench.forward import Options, gate, random_network
from tools.bench.timing import gpu_console
from turbodiffusion.errors import UserError
from turbodiffusion.variants import variant


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(bench.__path__)])
def test_every_benchmark_finds_what_it_times(name: str) -> None:
    importlib.import_module(f"tools.bench.{name}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time")
def test_kernels_are_not_timed_without_a_gpu() -> None:
    with pytest.raises(UserError, match="there is none here"):
        gpu_console("everything")


def test_a_step_of_finetuning_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["variant=wan_tiny", "frames=5", "size=32x32", "device=cpu", "steps=1", "remat=block"]
    monkeypatch.setattr(sys, "argv", ["sla_step", *words, "block_q=2", "block_k=2", "ratio=0.5"])
    sla_step.main()
    assert "remat=block" in capsys.readouterr().out


def test_networks_that_differ_from_dense_fp32_are_not_timed() -> None:
    row = variant("wan_tiny")
    network = random_network(row, torch.device("cpu"), torch.bfloat16)
    errors = gate(network, row, ["dense", "sla"], Options(device="cpu"))
    # bf16 rounds at 0.4 %; all blocks kept, and with a linear branch of zero, both are one network
    assert 1e-3 < errors["sla"] < 2e-2
    assert errors["sla"] == pytest.approx(errors["dense"], rel=0.3)
    network.blocks[1].ffn[0].weight.data[:] = torch.nan
    with pytest.raises(SystemExit, match="dense differs from dense fp32 by nan: not timed"):
        gate(network, row, ["dense"], Options(device="cpu"))
