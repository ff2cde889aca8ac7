"""Dimensions on features: by hand, and of small networks of random weights, whole and in parts."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear, normalize

from evaluation.backbones.clip import ImageTower, TextTower
from evaluation.backbones.pixels import for_clip, for_clip_by_pil, for_dino
from evaluation.backbones.vit import Dino
from evaluation.metrics import METRICS
from evaluation.metrics.action import action_of, likely
from evaluation.metrics.consistency import likeness
from evaluation.prompts import Prompt
from evaluation.records import Score
from evaluation.videos import Footage, Video
from tests.evaluation.backbones.golden import numbers, pictures
from tests.evaluation.backbones.test_networks import saved
from turbodiffusion.errors import UserError

# fp32's rounding where a batch of frames is summed in another order than one
ROUNDING = 1e-5


def made(net: nn.Module) -> nn.Module:
    state = {name: numbers(name, tuple(x.shape)) for name, x in net.state_dict().items()}
    net.load_state_dict(state)
    return net.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of small networks, in the layout of the published ones."""
    folder = tmp_path_factory.mktemp("weights")
    found = {name: folder / f"{name}.pth" for name in ("dino_b16", "clip_b32", "clip_l14", "aesthetic")}
    sizes = {"width": 64, "layers": 1, "out": 64}
    torch.save(made(Dino(width=64, layers=1, patch=16, tokens=197)).state_dict(), found["dino_b16"])
    image, text = ImageTower(patch=32, length=50, **sizes), TextTower(length=8, vocabulary=600, **sizes)
    state = {f"visual.{name}": x for name, x in made(image).state_dict().items()} | made(text).state_dict()
    for name in ("clip_b32", "clip_l14"):
        torch.save({**state, "logit_scale": torch.tensor(4.6)}, found[name])
    torch.save({"weight": numbers("weight", (1, 64)), "bias": torch.tensor([5.0])}, found["aesthetic"])
    return found | {"musiq": saved("musiq", folder)}


def footage(frames: int, name: str = "a cat-0.mp4", **prompt: object) -> Footage:
    return Footage(Video(Path(name), Prompt("a cat", "a cat", **prompt)), pictures(frames, 240, 416), 16.0)


def score(name: str, files: dict[str, Path], seen: Footage) -> Score:
    with torch.no_grad():
        return METRICS[name](files).score(seen)


def test_likeness_by_hand() -> None:
    one, other = torch.eye(2)
    assert likeness(one.expand(4, 2)).tolist() == [1, 1, 1]
    assert likeness(torch.stack((one, other, one))).tolist() == [0, 0.5]
    # less than nothing alike counts as nothing
    assert likeness(torch.stack((one, -one, -one))).tolist() == [0, 0.5]
    # before: 0.8, 0.6, 0; first: 0.8, 0, 0
    four = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-1, 0]])
    # fp32's rounding
    torch.testing.assert_close(likeness(four), torch.tensor([0.8, 0.3, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(likeness(7 * four), likeness(four), atol=1e-6, rtol=0)


def features(look: nn.Module, prepare: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
    """Frame by frame."""
    return torch.cat([look(prepare(frame[None])) for frame in frames])


@torch.no_grad()
def test_a_long_video_in_parts_is_its_frames_one_by_one(files: dict[str, Path]) -> None:
    seen = footage(33)
    # what differs from frame to frame: squares of one colour
    colours = torch.randint(256, (33, 6, 8, 3)).byte()
    seen.pixels = colours.repeat_interleave(40, dim=1).repeat_interleave(52, dim=2)
    dino = made(Dino(width=64, layers=1, patch=16, tokens=197))
    alike = likeness(features(dino, for_dino, seen.pixels))
    found = score("subject_consistency", files, seen)
    assert found.units == 32
    assert found.total == pytest.approx(float(alike.sum()), abs=32 * ROUNDING)
    assert 0 < found.value < 1 - 1e-4
    clip = made(ImageTower(patch=32, length=50, width=64, layers=1, out=64))
    by_frame = features(clip, for_clip, seen.pixels)
    found = score("background_consistency", files, seen)
    assert found.total == pytest.approx(float(likeness(by_frame).sum()), abs=32 * ROUNDING)
    assert found.extras == {"video_sim": found.total, "cnt_per_video": 32}
    head = torch.load(files["aesthetic"])
    wanted = linear(normalize(by_frame, dim=-1), **head).mean() / 10
    assert score("aesthetic_quality", files, seen).total == pytest.approx(float(wanted), abs=ROUNDING)
    by_frame = features(clip, for_clip_by_pil, seen.pixels)
    wanted = cosine_similarity(by_frame[1:], by_frame[:-1]).mean()
    assert score("clip_temp", files, seen).total == pytest.approx(float(wanted), abs=ROUNDING)


def test_still_videos_are_consistent(files: dict[str, Path]) -> None:
    still = footage(3)
    still.pixels = still.pixels[:1].expand(3, -1, -1, -1)
    for name in ("subject_consistency", "background_consistency", "clip_temp"):
        # fp32's rounding of norms
        assert score(name, files, still).value == pytest.approx(1, abs=1e-6)


def test_imaging_quality_is_a_mean_of_ratings(files: dict[str, Path]) -> None:
    seen, rated = footage(1), []
    for frame in pictures(2, 100, 140):
        seen.pixels = frame[None]
        rated.append(score("imaging_quality", files, seen).total)
    seen.pixels = pictures(2, 100, 140)[[0, 0, 1, *[0] * 6]]
    wanted = (8 * rated[0] + rated[1]) / 9
    # of ratings, whose hundredths these are
    assert score("imaging_quality", files, seen).total == pytest.approx(wanted, abs=ROUNDING / 100)
    assert abs(rated[0] - rated[1]) > 10 * ROUNDING / 100


@pytest.fixture
def merges(tmp_path: Path) -> Path:
    """A list of two, for 516 ids."""
    with gzip.open(tmp_path / "merges.gz", "wt") as file:
        file.write("#version\nc a\nca t</w>\n")
    return tmp_path / "merges.gz"


def test_texts(files: dict[str, Path], merges: Path) -> None:
    both = {"clip_b32": files["clip_b32"], "vocabulary": merges}
    style = {"appearance_style": {"appearance_style": "a cat"}}
    seen = footage(3, auxiliary=style)
    sim, styled = score("clipsim", both, seen), score("appearance_style", both, seen)
    # the style is the prompt here
    assert styled.value == pytest.approx(sim.total, abs=1e-12)
    assert styled.units == len(styled.extras["frame_results"]) == 3
    assert styled.extras["cur_sim"] == styled.extras["frame_results"][-1]
    other = footage(3, auxiliary={"appearance_style": {"appearance_style": "a tac"}})
    assert abs(score("appearance_style", both, other).value - styled.value) > 1e-3
    with pytest.raises(UserError, match="auxiliary_info names no appearance_style"):
        score("appearance_style", both, footage(3))


def test_the_same_video_and_text_are_the_same_in_both_dimensions_of_viclip(
    merges: Path, tmp_path: Path
) -> None:
    state = torch.load(saved("viclip", tmp_path))["model"]
    state["text_encoder.token_embedding.weight"] = numbers("words", (600, 128))
    torch.save({"model": state}, tmp_path / "viclip.pth")
    given = {"viclip": tmp_path / "viclip.pth", "vocabulary": merges}

    def both(text: str) -> list[float]:
        seen = Footage(Video(Path("a.mp4"), Prompt("a", text)), pictures(9, 224, 224), 16.0)
        return [score(name, given, seen).total for name in ("temporal_style", "overall_consistency")]

    one, other = both("a cat")
    assert one == other
    assert abs(both("a tac")[0] - one) > 1e-3
    # 30 letters are read, between start and end
    assert both("c" * 29 + " a" + "t" * 40) == both("c" * 29 + " a" + "b" * 9)


def test_actions(tmp_path: Path) -> None:
    assert action_of("A person is riding or walking with horse-3.mp4") == "riding or walking with horse"
    assert action_of("A person is marching_of_late-0.mp4") == "marching"
    names = [f"class {i}" for i in range(400)]
    logits = torch.full((400,), -9.0)
    # sigmoid(1.735) is 0.85005, sigmoid(1.734) is 0.84992
    logits[[3, 5, 7]] = torch.tensor([4.0, 1.735, 1.734])
    assert likely(logits, names) == ["class 3", "class 5"]
    logits[:6] = torch.arange(10.0, 16.0)
    assert likely(logits, names) == [f"class {i}" for i in (5, 4, 3, 2, 1)]
    given = {"umt": saved("umt", tmp_path), "actions": tmp_path / "names.txt"}
    given["actions"].write_text("".join(f"Class {i}\t{i}\n" for i in reversed(range(400))))
    state = torch.load(given["umt"])["model"]
    state["head.bias"][7] = 50.0
    torch.save({"model": state}, given["umt"])
    right, wrong = (footage(3, f"A person is class {i}-0.mp4") for i in (7, 8))
    assert score("human_action", given, right) == Score(1.0, extras={"cor_num_per_video": 1})
    assert score("human_action", given, wrong) == Score(0.0, extras={"cor_num_per_video": 0})
    with pytest.raises(UserError, match="is named after 'a cat', which is no action that UMT knows"):
        score("human_action", given, footage(3, "A cat-0.mp4"))
