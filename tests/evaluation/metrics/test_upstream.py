"""Dimensions by VBench's own package, in whose place is one that has its interface but no detectors.

What a detector sees in a video is told by the video's name, so that every score is known.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evaluation.__main__ import Options, evaluate
from evaluation.backbones.weights import WEIGHTS
from evaluation.metrics.upstream import DETECTED
from evaluation.vbench import T2V
from tests.evaluation.conftest import ExitCode

ROOT = Path(__file__).resolve().parents[3]

# vbench 0.1.5: compute_NAME(json_dir, device, submodules, **kwargs) loads a network, reads the prompts and
# calls the module's own NAME(model, prompts, device) -> (score, videos), for all videos at once
COMMON = """
import json, os, signal, sys

def network(name, weights):
    print("loading", name)  # vbench is talkative on standard output
    assert os.path.isfile(weights)
    if os.environ.get("NO_NETWORK") == name:
        raise RuntimeError("the network of " + name + " is not what it was")

def prompts_of(json_dir, dimension):
    with open(json_dir) as file:
        return [
            {"prompt": p["prompt_en"], "video_list": p["video_list"],
             "auxiliary_info": p["auxiliary_info"][dimension]}
            for p in json.load(file) if dimension in p["dimension"]
        ]

def seen(path):
    '''Whether each frame shows what it should: as many do as the sample's number, of 16 or 5.'''
    with open(os.environ["SEEN"], "a") as file:
        file.write(os.path.basename(path) + "\\n")
    if os.path.basename(path) == os.environ.get("KILLED_AT"):
        os.kill(os.getppid(), signal.SIGKILL)
    if "unreadable" in path:
        raise ValueError("can not open " + path)
    shown = int(path[-5])
    return [1] * shown + [0] * ((5 if "short" in path else 16) - shown)
"""
FRAMES = """
from vbench.common import network, prompts_of, seen

def {name}(model, prompts, device):
    videos = []
    for prompt in prompts:
        assert prompt["auxiliary_info"]["{key}"]
        for path in prompt["video_list"]:
            shown = seen(path)
            videos.append(dict(video_path=path, video_results=sum(shown) / len(shown),
                               success_frame_count=sum(shown), frame_count=len(shown)))
    return sum(v["success_frame_count"] for v in videos) / sum(v["frame_count"] for v in videos), videos

def compute_{name}(json_dir, device, submodules_dict, **kwargs):
    network("{name}", {weights})
    return {name}(None, prompts_of(json_dir, "{name}"), device)
"""
GRIT = "submodules_dict['model_weight']"
TAG2TEXT = "submodules_dict['pretrained'] * (submodules_dict['image_size'] == 384)"
SPATIAL = FRAMES.replace(
    "success_frame_count=sum(shown), frame_count=len(shown)", "frame_results=shown"
).replace(
    'sum(v["success_frame_count"] for v in videos) / sum(v["frame_count"] for v in videos)',
    'sum(sum(v["frame_results"]) for v in videos) / sum(len(v["frame_results"]) for v in videos)',
)
# a video of which no frame shows the object does not count, and there must be one that does
COLOR = """
from vbench.common import network, prompts_of, seen

def color(model, prompts, device):
    total, videos = 0, []
    for prompt in prompts:
        word = prompt["prompt"].replace("a ", "").replace(prompt["auxiliary_info"]["color"], "").strip()
        assert word == "bird"
        for path in prompt["video_list"]:
            rate = sum(seen(path)) / 16
            if rate > 0:
                total += rate
                videos.append(dict(video_path=path, video_results=rate, cur_success_frame_rate=rate))
    return total / len(videos), videos

def compute_color(json_dir, device, submodules_dict, **kwargs):
    network("color", submodules_dict["model_weight"])
    return color(None, prompts_of(json_dir, "color"), device)
"""
ASKED = {
    "object_class": ("a person", {"object": "person"}),
    "multiple_objects": ("a bird and a short cat", {"object": "bird and cat"}),
    "color": ("a red bird", {"color": "red"}),
    "spatial_relationship": ("a cup on a short car", {"spatial_relationship": {"object_a": "cup"}}),
    "scene": ("alley", {"scene": {"scene": "alley"}}),
}
ALL = f"dims=[{','.join(DETECTED)}]"
# what upstream itself does with all of info.json
AT_ONCE = """
import importlib, json, sys
info, weights, *names = sys.argv[1:]
for name in names:
    compute = getattr(importlib.import_module("vbench." + name), "compute_" + name)
    given = dict(model_weight=weights, pretrained=weights, image_size=384)
    print(json.dumps(compute(info, "cpu", given)), file=sys.stderr)
"""
Call = Callable[..., int]


@pytest.fixture
def interpreter(tmp_path: Path) -> str:
    """One that has the package, and of torch, which takes seconds to start, what is needed."""
    made = {"common": COMMON, "__init__": "", "color": COLOR}
    for name, template, key, weights in (
        ("object_class", FRAMES, "object", GRIT),
        ("multiple_objects", FRAMES, "object", GRIT),
        ("spatial_relationship", SPATIAL, "spatial_relationship", GRIT),
        ("scene", FRAMES, "scene", TAG2TEXT),
    ):
        made[name] = template.format(name=name, key=key, weights=weights)
    (tmp_path / "lib" / "vbench").mkdir(parents=True)
    (tmp_path / "lib" / "torch.py").write_text("device = str\n")
    for name, text in made.items():
        (tmp_path / "lib" / "vbench" / f"{name}.py").write_text(text)
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "lib"} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def words(tmp_path: Path, interpreter: str, write_lossless: Callable[[Path, Tensor], None]) -> list[str]:
    """Options to score tmp_path/videos, three of each dimension, into tmp_path/run."""
    for name in set(DETECTED.values()):
        path = tmp_path / "weights" / WEIGHTS[name].file
        path.parent.mkdir(parents=True)
        with path.open("wb") as file:
            file.truncate(WEIGHTS[name].size)  # a hole, that takes no room
    (tmp_path / "videos").mkdir()
    entries = []
    for dimension, (prompt, auxiliary) in ASKED.items():
        files = [tmp_path / "videos" / f"{prompt}-{sample}.mp4" for sample in range(3)]
        for file in files:
            write_lossless(file, torch.randint(256, (2, 16, 16, 3)).byte())
        entry = {"prompt_en": prompt, "dimension": [dimension], "auxiliary_info": {dimension: auxiliary}}
        entries.append(entry | {"video_list": [str(file) for file in files]})
    (tmp_path / "info.json").write_text(json.dumps(entries))
    folders = [f"{name}={tmp_path / each}" for name, each in (("videos", "videos"), ("out", "run"))]
    files = [f"prompts={tmp_path / 'info.json'}", f"weights={tmp_path / 'weights'}"]
    return [*folders, *files, f"upstream={interpreter}", ALL, "device=cpu"]


@pytest.fixture
def call(words: list[str], tmp_path: Path, exit_code: ExitCode, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs the command with other options on top -> exit code."""
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    return lambda *others: exit_code(Options, evaluate, *words, *others)


def written(tmp_path: Path, name: str) -> dict:
    return json.loads((tmp_path / "run" / name).read_text())


def test_scores_are_those_of_upstream_over_all_videos_at_once(
    call: Call, interpreter: str, tmp_path: Path
) -> None:
    assert call() == 0
    # what it prints is kept from what it answers
    assert (tmp_path / "run" / "upstream-0" / "scene.log").read_text() == "loading scene\n"
    found = written(tmp_path, "eval_results.json")
    made = [interpreter, "-c", AT_ONCE, str(tmp_path / "info.json"), __file__, *DETECTED]
    lines = subprocess.run(made, capture_output=True, text=True, check=True).stderr.splitlines()
    for name, line in zip(DETECTED, lines, strict=True):
        raw, videos = json.loads(line)
        assert found[name][0] == pytest.approx(raw, abs=1e-15)  # the order of fp64 sums
        assert found[name][1] == videos
    # by hand: 0, 1 and 2 of the samples' frames show it; color leaves out the first
    assert found["scene"][0] == 3 / 48
    assert found["multiple_objects"][0] == found["spatial_relationship"][0] == 3 / 15
    assert (found["color"][0], len(found["color"][1])) == (3 / 32, 2)
    totals = written(tmp_path, "results.json")["totals"]
    expected = T2V.totals({name: each[0] for name, each in found.items()}).partial["semantic"]
    assert totals["partial"]["semantic"] == pytest.approx(expected, abs=1e-15)
    assert not set(DETECTED) & set(totals["missing"])


def test_what_a_killed_run_has_seen_is_not_seen_again(call: Call, words: list[str], tmp_path: Path) -> None:
    fatal = "a person-2.mp4"
    env = os.environ | {"KILLED_AT": fatal}
    killed = subprocess.run([sys.executable, "-m", "evaluation", *words], cwd=ROOT, env=env, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert call() == 0
    names = (tmp_path / "seen").read_text().splitlines()
    assert sorted(names) == sorted([*(path.name for path in (tmp_path / "videos").iterdir()), fatal])
    assert names[0] != fatal
    assert call() == 0
    assert (tmp_path / "seen").read_text().splitlines() == names
    assert written(tmp_path, "results.json")["dimensions"]["object_class"]["raw"] == 3 / 48


def test_what_fails_is_named_and_the_rest_scored(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alley, bad = (tmp_path / "videos" / name for name in ("alley-1.mp4", "unreadable-0.mp4"))
    entries = json.loads((tmp_path / "info.json").read_text())
    entries.append(entries[-1] | {"prompt_en": "unreadable"})
    (tmp_path / "info.json").write_text(json.dumps(entries))
    bad.write_bytes(alley.read_bytes())
    alley.write_bytes(b"no video")
    monkeypatch.setenv("NO_NETWORK", "color")
    assert call() == 2
    assert "5 of 16 videos could not be scored" in capsys.readouterr().err
    log = tmp_path / "run" / "upstream-0"
    failed = {each["video"]: each["reason"] for each in written(tmp_path, "results.json")["failures"]}
    ended = "has no color, as upstream's ended: RuntimeError: the network of color is not what it was"
    assert {failed.pop(f"a red bird-{sample}.mp4") for sample in range(3)} == {f"{ended} ({log}/color.log)"}
    said = f"fails in upstream's scene: ValueError: can not open {bad} ({log}/scene.log)"
    assert failed.pop(bad.name) == said
    assert "can not be read as a video" in failed.pop(alley.name)
    assert not failed
    assert written(tmp_path, "results.json")["dimensions"]["scene"]["raw"] == 2 / 32
    # the next run tries again
    monkeypatch.delenv("NO_NETWORK")
    assert call() == 2
    assert "2 of 16 videos could not be scored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (
            ("dims=[color,scene]", "upstream=null"),
            "color and scene: upstream=PYTHON must have VBench's own package: python3.10 -m venv",
        ),
        (("upstream=no/python",), "upstream=no/python is no interpreter; to make one: python3.10 -m venv"),
        (("upstream=/bin/false",), "/bin/false has no working vbench (it said nothing); to make one: "),
        (
            (f"upstream={sys.executable}",),
            "has no working vbench (ModuleNotFoundError: No module named 'vbench'); to make one: python3.10",
        ),
        (("weights=no",), "tag2text_swin_14m.pth, which is in none, for scene"),
    ],
)
def test_what_is_lacking_is_said_before_any_work(
    others: tuple[str, ...],
    said: str,
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VBENCH_CACHE_DIR", "no")
    assert call(*others) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert said in told
    assert not (tmp_path / "run").exists()
