"""The shipped small-world models do what the README says of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from distill.autoencoding import psnr
from evaluation.oracle import Oracle
from evaluation.small_world import Options, generate, load_pipeline
from turbodiffusion.checkpoints import load_vae
from turbodiffusion.small_world.captions import held_out_prompts
from turbodiffusion.small_world.clips import draw_scenes, render
from turbodiffusion.small_world.sprites import load_sprites

ASSETS = Path(__file__).resolve().parents[1] / "assets"
FILES = ("wan_tiny", "rcm_tiny", "turbo_tiny", "vae_tiny", "text_tiny")


@pytest.mark.parametrize("name", FILES)
def test_checkpoint_says_how_it_was_made_and_stays_small(name: str) -> None:
    path = ASSETS / f"{name}.safetensors"
    assert path.stat().st_size < 16e6
    with safe_open(path, framework="pt") as file:
        carried = json.loads(file.metadata()["turbodiffusion"])
    assert carried["history"]
    assert carried["config"]


@torch.no_grad()
def test_vae_reconstructs_held_out_clips() -> None:
    vae = load_vae(ASSETS / "vae_tiny.safetensors", device="cpu", dtype=torch.float32)
    frames = render(draw_scenes(4, torch.Generator().manual_seed(7), "held_out_subjects"), load_sprites())
    back = vae.decode(vae.encode(frames, chunk=None), chunk=None)
    # 32.8 over 128 clips, which differ by some 2 dB; these subjects it has never seen
    assert psnr(back, frames).mean() > 30


@pytest.mark.parametrize(("name", "steps"), [("wan_tiny", 10), ("rcm_tiny", 4), ("turbo_tiny", 4)])
def test_a_network_shows_what_the_caption_says(name: str, steps: int) -> None:
    ckpt = str(ASSETS / f"{name}.safetensors")
    options = Options(ckpt=ckpt, device="cpu", dtype="float32", steps=steps, count=4, batch=4)
    sprites, prompts = load_sprites(), held_out_prompts(options.count)
    (clips,) = generate(load_pipeline(options), prompts, sprites, options)
    readings = Oracle(sprites).read(clips)
    # of 512 prompts: every background, 19 of 20 motions and 7 of 8 subjects
    assert [r.background for r in readings] == [p.background for p in prompts]
    for attribute in ("subject", "motion"):
        pairs = zip(readings, prompts, strict=True)
        assert sum(getattr(r, attribute) == getattr(p, attribute) for r, p in pairs) >= 3
