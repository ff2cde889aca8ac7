"""Networks beside those that their weights were published for, in the layout of the published files.

upstream.json holds names and shapes of the state dicts of vbench 0.1.5's RAFT, AMT-S, UMT and ViCLIP (the
last two made two layers deep and 128 wide) and of pyiqa 0.1.10's MUSIQ, and up to eight evenly spaced numbers
of what each made, on torch 2.13, of `golden.pictures` when filled with `golden.numbers`.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evaluation.backbones.amt import Amt, load_amt
from evaluation.backbones.clip import ImageTower, TextTower, VideoTower, load_viclip
from evaluation.backbones.musiq import load_musiq
from evaluation.backbones.raft import Raft, load_raft
from evaluation.backbones.vit import Dino, Umt, load_umt
from tests.evaluation.backbones.golden import numbers, pictures
from turbodiffusion.errors import UserError

CPU = torch.device("cpu")
UPSTREAM = json.loads(Path(__file__).with_name("upstream.json").read_text())


def saved(name: str, path: Path) -> Path:
    """A file as published, with made-up numbers."""
    state = {}
    for key, size in UPSTREAM[name]["layout"].items():
        shape = tuple(int(each) for each in size.split("x") if each)
        state[key] = numbers(key.removeprefix("module."), shape)
        if key.endswith("running_mean"):
            state[key.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    # upstream has one norm under two names
    state |= {key: state[key.replace("norm3", "downsample.1")] for key in state if ".norm3." in key}
    torch.save({"model": state} if name in ("umt", "viclip") else state, path / f"{name}.pth")
    return path / f"{name}.pth"


def look(name: str, file: Path, device: torch.device = CPU) -> Tensor:
    frames = pictures(2, 128, 144).to(device).movedim(-1, 1).float()
    video = pictures(16, 224, 224).to(device).movedim(-1, 1)[None].float() / 127.5 - 1
    if name == "raft":
        return load_raft(file, device)(frames[:1], frames[1:])
    if name == "amt":
        return load_amt(file, device)(*(frames / 255).split(1)).clamp(0, 1)
    if name == "musiq":
        return load_musiq(file, device)(pictures(2, 90, 140).to(device).movedim(-1, 1).float() / 255)
    if name == "umt":
        return load_umt(file, device)(video)
    seen, read = load_viclip(file, device)
    return torch.cat([seen(video[:, :8]), read(torch.tensor([[498, 5, 6, 7, 499]], device=device))])


# numbers are written with six decimals; flows come of 20 steps, whose rounding errors add up
@pytest.mark.parametrize(
    ("name", "allowed"), [("raft", 2e-4), ("amt", 2e-5), ("musiq", 2e-6), ("umt", 2e-6), ("viclip", 2e-6)]
)
def test_networks_see_what_upstreams_do(name: str, allowed: float, tmp_path: Path) -> None:
    found = look(name, saved(name, tmp_path)).double().flatten()
    wanted = torch.tensor(UPSTREAM[name]["values"], dtype=torch.float64)
    places = torch.linspace(0, len(found) - 1, len(wanted)).long()
    torch.testing.assert_close(found[places], wanted, atol=allowed, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", UPSTREAM)
def test_networks_see_the_same_on_a_gpu(name: str, tmp_path: Path) -> None:
    file = saved(name, tmp_path)
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = look(name, file, torch.device("cuda")).cpu()
    # fp32 summed in another order, ten times what the CPU's own orders make
    torch.testing.assert_close(found, look(name, file), atol=2e-3 if name == "raft" else 2e-4, rtol=0)


def test_sizes_are_those_that_were_published() -> None:
    with torch.device("meta"):
        nets = {
            "dino_b16": (Dino(width=768, layers=12, patch=16, tokens=197),),
            "clip_b32": (
                ImageTower(width=768, layers=12, patch=32, length=50, out=512),
                TextTower(width=512, layers=12, length=77, vocabulary=49408, out=512),
            ),
            "clip_l14": (
                ImageTower(width=1024, layers=24, patch=14, length=257, out=768),
                TextTower(width=768, layers=12, length=77, vocabulary=49408, out=768),
            ),
            "viclip": (VideoTower(frames=8, width=1024, layers=24, patch=14, length=257, out=768),),
            "viclip's text": (TextTower(width=768, layers=12, length=32, vocabulary=49408, out=768),),
            "umt": (Umt(width=1024, layers=24, patch=16, tokens=3136, classes=400),),
            "raft": (Raft(),),
            "amt": (Amt(),),
        }
    counts = {name: sum(x.numel() for net in each for x in net.parameters()) for name, each in nets.items()}
    assert counts == {
        "dino_b16": 85_798_656,
        "clip_b32": 151_277_313 - 1,  # less its temperature, which nothing here needs
        "clip_l14": 427_616_513 - 1,
        "viclip": 303_974_400,
        "viclip's text": 123_615_744,
        "umt": 306_695_568 + 24 * 1024,  # keys get a bias, of zeros
        "raft": 5_257_536,
        "amt": 2_990_543,
    }
    lists = {name: each["layout"] for name, each in UPSTREAM.items()}
    sizes = {n: sum(math.prod(map(int, x.split("x"))) for x in lists[n].values()) for n in ("amt", "musiq")}
    assert sizes == {"amt": 2_990_543, "musiq": 27_125_825}
    assert (len(lists["amt"]), len(lists["musiq"])) == (213, 248)


def test_a_pair_is_the_same_in_a_batch(tmp_path: Path) -> None:
    one, other = pictures(2, 128, 144).movedim(-1, 1).float().split(1)
    both = torch.cat((one, other)), torch.cat((other, one))
    flow = load_raft(saved("raft", tmp_path), CPU)
    # a batch may be summed in another order, 20 times over; flows are tens of pixels
    torch.testing.assert_close(flow(*both)[:1], flow(one, other), atol=2e-4, rtol=0)
    between = load_amt(saved("amt", tmp_path), CPU)
    many = between(*(each / 255 for each in both))
    torch.testing.assert_close(many[:1], between(one / 255, other / 255), atol=2e-5, rtol=0)


def test_a_file_of_something_else_is_refused_but_for_what_upstream_ignores(tmp_path: Path) -> None:
    state = torch.load(saved("amt", tmp_path))
    torch.save(state | {"decoder9.weight": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"more\.pth holds other weights than it should.*decoder9\.weight"):
        load_amt(tmp_path / "more.pth", CPU)
    state = torch.load(saved("umt", tmp_path))["model"]
    torch.save(state | {"norm.weight": torch.zeros(128)}, tmp_path / "umt.pth")
    load_umt(tmp_path / "umt.pth", CPU)
    state = torch.load(tmp_path / "amt.pth")
    del state["comb_block.2.bias"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"less\.pth holds other weights.*comb_block\.2\.bias"):
        load_amt(tmp_path / "less.pth", CPU)
