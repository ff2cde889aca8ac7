"""Prompt files; the leaderboard's own where VBENCH_FULL_INFO names it."""

import json
import os
from pathlib import Path

import pytest

from evaluation.prompts import file_name, parse_name, read_prompts
from turbodiffusion.errors import UserError

COUNTS = {
    **dict.fromkeys(("human_action", "temporal_style"), 100),
    **dict.fromkeys(("overall_consistency", "aesthetic_quality", "imaging_quality"), 93),
    **dict.fromkeys(("scene", "background_consistency"), 86),
    **dict.fromkeys(("subject_consistency", "dynamic_degree", "motion_smoothness"), 72),
    **{"appearance_style": 90, "color": 85, "spatial_relationship": 84, "multiple_objects": 82},
    **{"object_class": 79, "temporal_flickering": 75},
}


@pytest.mark.skipif("VBENCH_FULL_INFO" not in os.environ, reason="VBENCH_FULL_INFO names no file")
def test_the_leaderboards_prompts() -> None:
    suite = read_prompts(Path(os.environ["VBENCH_FULL_INFO"]))
    assert suite.is_standard
    # of 946 entries two repeat another
    assert len(suite.prompts) == 944
    assert suite.prompts[-1].index == 945
    assert len(suite.prompts) * suite.samples == 4720
    assert suite.counts() == COUNTS
    twice = next(prompt for prompt in suite.prompts if prompt.name == "The bund Shanghai, oil painting")
    assert twice.dimensions == {
        *("appearance_style", "overall_consistency", "aesthetic_quality", "imaging_quality")
    }
    assert twice.auxiliary == {"appearance_style": {"appearance_style": "oil painting"}}
    names = {prompt.name for prompt in suite.prompts}
    assert {"A fantasy landscape", "a fantasy landscape"} <= names
    for name in names:
        assert parse_name(Path(file_name(name, 4)).stem) == (name, 4)


def test_a_prompt_listed_twice_is_one(tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    entries = [
        {"prompt_en": "a cat", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
        {"prompt_en": "a dog", "dimension": ["scene"]},
        {"prompt_en": "a cat", "dimension": ["aesthetic_quality"]},
    ]
    path.write_text(json.dumps(entries))
    suite = read_prompts(path)
    assert [prompt.name for prompt in suite.prompts] == ["a cat", "a dog"]
    assert suite.prompts[0].dimensions == {"color", "aesthetic_quality"}
    assert suite.prompts[0].auxiliary == {"color": {"color": "red"}}
    assert suite.samples == 5
    assert not suite.is_standard


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.txt", "a cat\n\n  a dog\n", [("a cat", "a cat"), ("a dog", "a dog")]),
        ("p.json", '{"1.mp4": "a cat", "b-2.mp4": "a dog"}', [("1", "a cat"), ("b-2", "a dog")]),
        (
            "p.jsonl",
            '{"prompt": "a cat"}\n{"name": "x", "prompt": "a/b", "seed": 3}',
            [("a cat",) * 2, ("x", "a/b")],
        ),
    ],
)
def test_own_prompts(tmp_path: Path, name: str, content: str, prompts: list[tuple[str, str]]) -> None:
    (tmp_path / name).write_text(content)
    suite = read_prompts(tmp_path / name)
    assert [(prompt.name, prompt.text) for prompt in suite.prompts] == prompts
    assert suite.samples is None
    assert {prompt.dimensions for prompt in suite.prompts} == {None}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.csv", "a cat", "ends in .txt, .json or .jsonl"),
        ("p.txt", "\n", "holds no prompt"),
        ("p.txt", "one/two", "'one/two' can not name a file"),
        ("p.json", "3", "holds a int; wanted a list"),
        ("p.json", '{"a.mp4": ["a cat"]}', r'entry 1 has no prompt: got \{"prompt": \["a cat"\]'),
        ("p.json", "{", "p.json can not be read"),
        ("p.jsonl", '{"prompt": "a cat"}\n{"text": "a dog"}', "line 2 has no prompt"),
        ("p.jsonl", '{"prompt": "a cat", "dimension": ["colour"]}', "there is no dimension colour"),
        ("p.jsonl", '{"prompt": "a cat", "dimension": "color"}', "`dimension` a list"),
        (
            "p.jsonl",
            '{"name": "x", "prompt": "a"}\n{"name": "x", "prompt": "b"}',
            "'x' already names the videos of 'a'",
        ),
    ],
)
def test_a_file_in_the_wrong_form_is_refused(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        read_prompts(tmp_path / name)


def test_what_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("p.txt", "q.txt"):
        with pytest.raises(UserError, match=name):
            read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("stem", "parsed"),
    [("a cat-0", ("a cat", 0)), ("a cat", ("a cat", None)), ("3-2-10", ("3-2", 10)), ("-1", ("-1", None))],
)
def test_names_of_files(stem: str, parsed: tuple[str, int | None]) -> None:
    assert parse_name(stem) == parsed
