import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from turbodiffusion.checkpoints import load_network, load_text_encoder, load_vae

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "steps=2",
    "clips=3",
    "held_out=2",
    "window.frames=5",
    "window.size=32",
    "judged_window.frames=5",
    "judged_window.size=32",
    "preview_every=9",
    "save_every=1",
)


def train(experiment: str, *options: str) -> str:
    """Run the command of the experiment's first line at the smallest sizes; its output."""
    command = [sys.executable, "train.py", f"experiment={experiment}", "debug=true", *TINY, *options]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TERM": "dumb"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_four_experiments_build_on_each_other(tmp_path: Path):
    """VAE and text encoder, the teacher on both, then image to video; then the same command again."""
    out, cpu = f"out={tmp_path}", torch.device("cpu")
    train("vae_tiny", out)
    vae = tmp_path / "vae_tiny" / "vae_tiny.safetensors"
    assert load_vae(vae, device=cpu, dtype=torch.float32).config["latent_mean"] != [0.0] * 16

    train("text_tiny", out)
    text_encoder = tmp_path / "text_tiny" / "text_tiny.safetensors"
    load_text_encoder(text_encoder, device=cpu, dtype=torch.bfloat16)

    given = (out, f"recipe.vae={vae}", f"recipe.start.text_encoder={text_encoder}")
    train("teacher_tiny", *given)
    folder = tmp_path / "teacher_tiny"
    loaded = load_network(folder / "wan_tiny.safetensors", device=cpu, dtype=torch.bfloat16)
    assert (loaded.variant.name, loaded.sampling.steps) == ("wan_tiny", 50)
    assert {path.suffix for path in (folder / "previews").iterdir()} == {".png", ".webp"}

    train("teacher_tiny_i2v", *given, f"recipe.start.network={folder / 'wan_tiny.safetensors'}")
    shipped = tmp_path / "teacher_tiny_i2v" / "wan_tiny_i2v.safetensors"
    with safe_open(shipped, "pt") as file:
        history = json.loads(file.metadata()["turbodiffusion"])["history"]
    assert [entry["trained"] for entry in history] == ["teacher_tiny", "teacher_tiny_i2v"]
    # a frozen text encoder is not written again
    assert not (shipped.parent / "text_tiny.safetensors").exists()

    again = train("teacher_tiny", *given)
    assert "goes on from step 2" in again
    assert "step 3" not in again
