"""Attention on trial beside exact attention, in a real network."""

from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.attention import Options, measure, table

ROOT = Path(__file__).resolve().parents[2]


def test_blocks_left_out_show_in_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    small = Options(attention="sla", count=1, steps=2, device="cpu", dtype="float32", block_q=16, block_k=16)
    whole, said = measure(replace(small, ratio=1.0))
    assert said.endswith(": 0.0 % of blocks left out")
    # nothing is left out and a new linear branch is zero: rounding of fp32 sums over 495 keys
    assert whole.compute()["worst_relative_l1"] < 1e-4
    few, said = measure(replace(small, ratio=0.2))
    # 6 of 31 blocks
    assert said.endswith(": 80.6 % of blocks left out")
    errors = few.cells()["relative_l1"]
    assert errors.shape == (4, 2, 4)
    assert ((errors > 0.02) & (errors < 2)).all()
    # exact attention goes on: the inputs of both runs are the same, and so are the sums over exact outputs
    assert few.sums[..., 2].equal(whole.sums[..., 2])
    assert table(few, said).row_count == 5
