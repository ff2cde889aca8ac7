import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.found import find
from turbodiffusion.pipelines.prompts import read_items, slug
from turbodiffusion.pipelines.request import Request, choose_task, pick_device, pick_dtype, resolve
from turbodiffusion.variants import variants


@pytest.fixture
def resolved(family: Callable, tmp_path: Path) -> Callable[..., Request]:
    def make(variant: str = "wan_tiny", **changed: object) -> Request:
        options = family(variant).options(**{"out": str(tmp_path / "out"), **changed})
        found = find(options)
        return resolve(options, found.variant, found.sampling, found.multiple())

    return make


@pytest.mark.parametrize(
    ("variant", "first", "last", "task"),
    [
        ("wan2.1_t2v_14b", False, False, "t2v"),
        ("wan2.1_i2v_14b_720p", True, False, "i2v"),
        ("wan2.1_flf2v_14b", True, True, "flf2v"),
        ("wan2.2_ti2v_5b", False, False, "t2v"),
        ("wan2.2_ti2v_5b", True, False, "ti2v"),
        ("wan_tiny", True, False, "i2v"),
        ("wan_tiny", False, False, "t2v"),
    ],
)
def test_the_task_follows_from_variant_and_pictures(variant: str, first: bool, last: bool, task: str) -> None:
    assert choose_task(variants()[variant], has_image=first, has_last=last) == task


@pytest.mark.parametrize(
    ("variant", "first", "last", "said"),
    [
        ("wan2.1_t2v_14b", True, False, "leave image= away"),
        ("wan2.2_i2v_a14b", False, False, "pass image=FILE"),
        ("wan2.1_flf2v_14b", True, False, "pass last_image=FILE too"),
        ("wan2.1_flf2v_14b", False, True, "pass image=FILE"),
        ("wan2.2_ti2v_5b", True, True, "takes no last_image="),
        ("wan_tiny", False, True, "takes no last_image="),
    ],
)
def test_pictures_that_do_not_suit_the_variant_are_refused(
    variant: str, first: bool, last: bool, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        choose_task(variants()[variant], has_image=first, has_last=last)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": None}, 'pass prompt="..."'),
        ({"prompt_file": "x.txt"}, "exclude each other"),
        ({"size": "100x100"}, "divide by 16"),
        ({"size": "huge"}, "neither WIDTHxHEIGHT"),
        ({"size": "480p", "aspect": "5:4"}, "aspect=5:4"),
        ({"frames": 6}, "the nearest: 5, 9"),
        ({"steps": 0}, "steps=0"),
        ({"sampler": "ddim"}, "unipc, euler, dpmpp, rcm"),
        ({"sampler": "rcm", "steps": 5}, "1, 2, 3, 4"),
        ({"shift": -1.0}, "shift=-1"),
        ({"boundary": 0.9}, "one network"),
        ({"seed": -1}, "seed=-1"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"crf": 60}, "crf=60"),
        ({"fps": 0.0}, "fps=0"),
        ({"out": "a.gif"}, "written as .mp4"),
        ({"frames": 1, "out": "a.mp4"}, "written as .png"),
        ({"adaptive": True}, "pass image=FILE"),
        ({"image": "nowhere.png"}, "nowhere.png does not exist"),
    ],
)
def test_wrong_options_are_refused_with_what_to_do(resolved: Callable, changed: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolved(**changed)


def test_a_folder_that_can_not_be_made_is_refused(resolved: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="can not be made"):
        resolved(out=str(tmp_path / "file" / "out"))


def test_defaults_come_from_the_checkpoint_and_give_way_to_options(resolved: Callable) -> None:
    plain = resolved(steps=None, frames=None, size=None)
    row = variants()["wan_tiny"].sampling
    assert (plain.sampling.steps, plain.sampling.shift, plain.frames) == (row.steps, row.shift, 5)
    assert str(plain.shots[0].size) == "64x32"  # both in the checkpoint's own metadata
    said = resolved(steps=7, shift=2.0, guidance=1.5, negative_prompt="fog")
    assert (said.sampling.steps, said.sampling.shift, said.sampling.guidance) == (7, 2.0, 1.5)
    assert said.shots[0].negative_prompt == "fog"


def test_one_guidance_is_for_both_experts(resolved: Callable) -> None:
    sampling = resolved("wan2.2_t2v_a14b", guidance=2.0).sampling
    assert (sampling.guidance, sampling.guidance_low) == (2.0, 2.0)


def test_a_schedule_that_never_reaches_an_expert_is_warned_about(
    resolved: Callable, picture: Callable
) -> None:
    with pytest.warns(UserWarning, match="never reach the low-noise expert"):
        resolved("wan2.2_i2v_a14b", sampler="rcm", steps=2, image=str(picture()))


def test_a_student_of_pictures_starts_at_sigma_200(resolved: Callable, picture: Callable) -> None:
    assert resolved(sampler="rcm", steps=None).sampling.sigma_max == 80
    sampling = resolved(sampler="rcm", steps=None, image=str(picture())).sampling
    assert (sampling.sigma_max, sampling.steps, sampling.guidance) == (200, 4, 1)
    assert resolved(sampler="rcm", steps=None, sigma_max=120.0).sampling.sigma_max == 120


def test_adaptive_size_follows_the_picture(resolved: Callable, picture: Callable) -> None:
    shot = resolved(image=str(picture(size=(50, 200))), adaptive=True, size="128x128").shots[0]
    assert str(shot.size) == "64x256"


def test_a_stretched_picture_is_warned_about(resolved: Callable, picture: Callable) -> None:
    with pytest.warns(UserWarning, match="adaptive=true keeps its shape"):
        resolved(image=str(picture(size=(50, 200))), size="128x128")


def test_ti2v_needs_multiples_of_32(resolved: Callable) -> None:
    with pytest.raises(UserError, match="divide by 32"):
        resolved("wan2.2_ti2v_5b", size="48x32")


def test_prompt_files_of_each_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one, two\n\n  three=3  \n", encoding="utf-8-sig")
    assert [item.prompt for item in read_items(tmp_path / "a.txt")] == ["one, two", "three=3"]
    entries = ["one", {"prompt": "two", "image": "p.png", "seed": 3, "name": "second"}]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, entries)))
    for name in ("a.json", "a.jsonl"):
        first, second = read_items(tmp_path / name)
        assert (first.prompt, first.name) == ("one", "0000-one")
        assert (second.image, second.seed, second.name) == (tmp_path / "p.png", 3, "second")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "x", "ends in .txt, .json or .jsonl"),
        ("a.txt", "\n\n", "holds no prompt"),
        ("a.json", "{", "is not JSON"),
        ("a.json", '{"prompt": "x"}', "wanted a list"),
        ("a.jsonl", '"ok"\nnope', "line 2 is not JSON"),
        ("a.jsonl", '{"text": "x"}', "line 1 is neither a prompt"),
        ("a.jsonl", '{"prompt": "x", "steps": 3}', "unknown field 'steps'"),
        ("a.jsonl", '{"prompt": "x", "seed": "3"}', "seed is '3', wanted a whole number"),
        ("a.jsonl", '{"prompt": "x", "name": "../x"}', "not a plain file name"),
    ],
)
def test_prompt_files_that_can_not_be_used(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        read_items(tmp_path / name)


def test_a_prompt_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_items(tmp_path / "a.txt")


def test_two_prompts_never_share_a_file(resolved: Callable, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "name": "same"}\n{"prompt": "y", "name": "same"}')
    with pytest.raises(UserError, match="give them different names"):
        resolved(prompt=None, prompt_file=str(tmp_path / "a.jsonl"))


def test_file_names_of_prompts_are_legal_everywhere() -> None:
    assert slug("An octopus, drifts/left: 2x!") == "an-octopus-drifts-left-2x"
    assert slug("猫" * 200) == "猫" * 48
    assert slug("...///") == "video"


def test_devices_and_dtypes(resolved: Callable) -> None:
    cpu = torch.device("cpu")
    assert pick_device("cpu") == cpu
    assert pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    for name, said in (("gpu", "is not a device"), ("cuda:99", "PyTorch sees"), ("", "is not a device")):
        with pytest.raises(UserError, match=said):
            pick_device(name)
    with pytest.raises(UserError, match="auto, bfloat16, float32"):
        pick_dtype("int8", cpu)
