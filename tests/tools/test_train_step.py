"""The training benchmark: its floor against independent figures, and a run of it at the smallest size."""

import sys

import pytest

from tools.bench import train_step
from tools.bench.train_block import floors
from turbodiffusion.variants import variant

# teraFLOP of a dense forward, of its tangent pass and of a full step, counted product by product
COUNTED = {
    ("wan2.1_t2v_1.3b", 32_760): (283, 767, 3_232),
    ("wan2.1_t2v_1.3b", 75_600): (1_250, 3_560, 14_620),
    ("wan2.1_t2v_14b", 32_760): (1_678, 4_250, 18_570),
    ("wan2.1_t2v_14b", 75_600): (6_523, 17_761, 74_662),
}
WORDS = ["variant=wan_tiny", "frames=5", "size=32x32", "device=cpu"]


@pytest.mark.parametrize(("name", "tokens"), COUNTED)
def test_floors_are_those_counted_elsewhere(name: str, tokens: int) -> None:
    seconds = floors({"text_length": 512} | variant(name).network, tokens)
    forward, tangent, training = (seconds[kind] * 790 for kind in ("forward", "tangent", "training"))
    full = 2 * forward + tangent + 2 * training
    # the smallest of the counts has 3 digits
    assert (forward, tangent, full) == pytest.approx(COUNTED[name, tokens], rel=2e-3)


@pytest.mark.parametrize("block", ["true", "false"])
def test_it_runs_on_a_cpu(block: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["train_step", *WORDS, "steps=1", "remat=none,block", f"block={block}"])
    train_step.main()
    shown = capsys.readouterr().out
    assert "remat=block" in shown
    assert "full step" in shown


def test_a_step_of_finetuning_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    sparse = ["experiment=sla_wan1_3b", "block_q=2", "block_k=2", "ratio=0.5"]
    monkeypatch.setattr(sys, "argv", ["train_step", *WORDS, "steps=1", "remat=block", *sparse])
    train_step.main()
    shown = capsys.readouterr().out
    assert "remat=block" in shown
    assert "a student's turn" in shown
