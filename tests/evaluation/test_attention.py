"""Fidelity of attention: against closed forms, and in a real network."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaluation.attention import AttentionFidelity, Options, measure, table
from turbodiffusion.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# sums and roots in fp64 of inputs that are fp64
EXACT = {"rel": 1e-12}


def test_against_definitions() -> None:
    exact = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    test = exact + 0.1 * torch.randn_like(exact)
    metric = AttentionFidelity(layers=2, steps=1, heads=3)
    metric.update(test, exact, layer=1, step=0)
    cells = metric.cells()
    x, y = (each.transpose(0, 1).flatten(1) for each in (test, exact))
    wanted = {
        "cos_sim": torch.cosine_similarity(x, y),
        "relative_l1": (x - y).abs().mean(1) / y.abs().mean(1),
        "rmse": (x - y).square().mean(1).sqrt(),
    }
    for name, values in wanted.items():
        assert cells[name][1, 0].tolist() == pytest.approx(values.tolist(), **EXACT)
        assert cells[name][0].isnan().all()


def test_twice_the_output_beside_the_output() -> None:
    exact = torch.ones(1, 1, 4, 4)
    metric = AttentionFidelity(layers=3, steps=1, heads=1)
    metric.update(2 * exact, exact, layer=0, step=0)
    metric.update(exact, exact, layer=2, step=0)
    assert {name: float(x) for name, x in metric.compute().items()} == pytest.approx(
        {
            **{"cos_sim": 1, "relative_l1": 0.5, "rmse": 0.5},
            **{"worst_cos_sim": 1, "worst_relative_l1": 1, "worst_rmse": 1},
        },
        **EXACT,
    )


def test_a_batch_is_its_samples() -> None:
    test, exact = torch.randn(2, 4, 2, 6, 8)
    together, alone = (AttentionFidelity(layers=1, steps=1, heads=2) for _ in range(2))
    together.update(test, exact, layer=0, step=0)
    for i in range(4):
        alone.update(test[i : i + 1], exact[i : i + 1], layer=0, step=0)
    # the order of fp64 sums
    torch.testing.assert_close(together.compute(), alone.compute(), rtol=1e-12, atol=0)


def test_wrong_shapes_and_nothing_seen_are_refused() -> None:
    metric = AttentionFidelity(layers=1, steps=1, heads=2)
    with pytest.raises(UserError, match=r"\(B, 2, L, D\)"):
        metric.update(torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4), layer=0, step=0)
    with pytest.raises(UserError, match="no attention was seen"):
        metric.compute()


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
