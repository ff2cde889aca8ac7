"""Benchmarks of real-size networks, at the smallest size and on a CPU."""

import importlib
import json
import pkgutil
import sys
from pathlib import Path

import pytest
import torch

from tools import bench
from tools.bench import __main__ as whole
from tools.bench import generation
from tools.bench.forward import Options, gate, random_network
from turbodiffusion.variants import variant


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(bench.__path__)])
def test_every_benchmark_finds_what_it_times(name: str) -> None:
    importlib.import_module(f"tools.bench.{name}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time")
@pytest.mark.parametrize("name", [*whole.KERNELS, "forward"])
def test_nothing_is_timed_without_a_gpu_but_one_sentence_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit):
        importlib.import_module(f"tools.bench.{name}").main()
    assert "there is none here" in capsys.readouterr().err


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


def run_whole(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    tiny = [
        "variant=wan_tiny",
        "device=cpu",
        "size=32x32",
        "frames=5",
        "steps=2",
        "repeats=1",
        "compile=false",
    ]
    sparse = ["attention=sla", "block_q=2", "block_k=2", "ratio=0.5"]
    monkeypatch.setattr(sys, "argv", ["bench", *tiny, *sparse, *words])
    whole.main()


def test_every_factor_and_stage_is_timed_and_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_whole(monkeypatch, f"dst={tmp_path}/new/bench")
    table = json.loads((tmp_path / "new" / "bench.json").read_text())
    ways = ["dense", "sparse-linear attention", "fused norms", "linear layers in int8"]
    assert list(table["forwards"]) == ways
    spent = table["denoising"]
    assert list(spent.values()) == [
        100 * table["dense"]["eager"],
        *(2 * table["forwards"][way] for way in ways),
        table["stages"]["denoise"],
    ]
    assert table["stages"].keys() == {"text", "denoise", "decode", "write"}
    assert min(*spent.values(), *table["stages"].values()) > 0
    assert (tmp_path / "new" / "bench.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*spent, *table["stages"]))


def test_generations_alone_are_timed_with_guidance(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_whole(monkeypatch, "compare=false", "guided=true", "quant=none", "offload=stage")
    printed = capsys.readouterr().out
    assert "decode" in printed
    assert "50 guided steps" not in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [(["cap=24"], "cap= limits the memory of a CUDA device"), (["variant=wan2.1_i2v_14b_480p"], "from text")],
)
def test_what_can_not_be_timed_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        run_whole(monkeypatch, *words)
    assert said in capsys.readouterr().err


def test_what_is_off_is_no_factor() -> None:
    ways = generation.ways(generation.Options(attention="dense", quant="none"))
    assert [way.label for way in ways] == ["dense", "fused norms"]


def test_kernels_of_the_loop_and_of_decoding_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tiny = ["variant=wan_tiny", "device=cpu", "size=32x32", "frames=5", "attention=dense", "quant=none"]
    monkeypatch.setattr(sys, "argv", ["profile", *tiny, "rows=50"])
    importlib.import_module("tools.bench.profile").main()
    loop, decoding = capsys.readouterr().out.split("decode: ")
    assert "denoise: " in loop
    assert "scaled_dot_product" in loop
    assert "convolution" in decoding
