"""Where weights are looked for, what is said of those that are missing, and what is read of files."""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evaluation.__main__ import Options, evaluate
from evaluation.backbones.weights import WEIGHTS, find_weights, read_flax
from tests.evaluation.backbones.test_networks import saved
from turbodiffusion.errors import UserError


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No weights but those of a test."""
    monkeypatch.setenv("TURBODIFFUSION_WEIGHTS", str(tmp_path / "ours"))
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "theirs"))


def test_all_that_is_missing_is_named_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a cat-0.mp4").touch()
    dims = ["imaging_quality", "temporal_style", "overall_consistency"]
    with pytest.raises(UserError) as caught:
        evaluate(Options(str(tmp_path / "videos"), dims, str(tmp_path / "out")))
    start, musiq, viclip, vocabulary = re.split("=: |; ", str(caught.value))
    places = f"weights=DIR, {tmp_path}/ours, {tmp_path}/theirs"
    assert start == f"get weights into one of {places}, or leave out their dims"
    assert musiq == (
        "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth, which is in none, for imaging_quality (109 MB, licence "
        "that of IQA-PyTorch, non-commercial), from https://github.com/chaofengc/IQA-PyTorch/releases/download/"
        "v0.1-weights/musiq_spaq_ckpt-358bb6af.pth"
    )
    both = "which is in none, for temporal_style and overall_consistency"
    assert viclip.startswith(f"ViCLIP/ViClip-InternVid-10M-FLT.pth, {both}")
    assert vocabulary.startswith(f"ViCLIP/bpe_simple_vocab_16e6.txt.gz, {both}")
    assert not (tmp_path / "out").exists()


def test_places_are_tried_in_turn_with_folders_and_without(tmp_path: Path) -> None:
    file = WEIGHTS["aesthetic"].file
    name = Path(file).name
    places = [
        tmp_path / place for place in (f"theirs/{file}", f"ours/{name}", f"ours/{file}", f"given/{name}")
    ]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(bytes(WEIGHTS["aesthetic"].size))
        assert find_weights({"a": ["aesthetic"]}, tmp_path / "given") == {"aesthetic": place}


def test_what_was_cut_off_or_is_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "amt-s.pth").write_bytes(bytes(WEIGHTS["amt_s"].size - 1))
    with pytest.raises(UserError, match=r"amt-s\.pth was cut off at 12 MB, for a "):
        find_weights({"a": ["amt_s"]}, tmp_path)
    (tmp_path / "alexnet.ckpt").write_bytes(bytes(WEIGHTS["lpips_alex"].size))
    with pytest.raises(UserError, match=r"alexnet\.ckpt is another file: its sha256 is not 443c5bc3"):
        find_weights({"a": ["lpips_alex"]}, tmp_path)


def test_a_pickle_of_arrays_can_run_nothing(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "bad.ckpt").write_bytes(pickle.dumps({"a": Bad()}))
    with pytest.raises(UserError, match=r"bad\.ckpt is not a pickle of arrays: it wants (posix|nt)\.mkdir"):
        read_flax(tmp_path / "bad.ckpt")
    assert not (tmp_path / "made").exists()
    array = torch.rand(2, 3).numpy()
    (tmp_path / "good.ckpt").write_bytes(pickle.dumps({"a": {"b": array}, "c": array}))
    assert {name: x.tolist() for name, x in read_flax(tmp_path / "good.ckpt").items()} == {
        "a/b": array.tolist(),
        "c": array.tolist(),
    }


def test_other_weights_are_scored_anew(
    tmp_path: Path, write_lossless: Callable[[Path, Tensor], None]
) -> None:
    (tmp_path / "videos").mkdir()
    for i in range(2):
        write_lossless(tmp_path / "videos" / f"a cat-{i}.mp4", torch.randint(256, (3, 128, 128, 3)).byte())
    amt = saved("amt", tmp_path)
    (tmp_path / "given").mkdir()
    options = Options(
        *(str(tmp_path / "videos"), ["motion_smoothness"], str(tmp_path / "out")),
        weights=str(tmp_path / "given"),
        device="cpu",
    )
    known = []
    for times in range(1, 4):
        if times != 2:
            # a file's time is part of what it is
            (tmp_path / "given" / "amt-s.pth").write_bytes(amt.read_bytes())
            os.utime(tmp_path / "given" / "amt-s.pth", ns=(times, times))
        evaluate(options)
        known.append(len((tmp_path / "out" / "scored-0.jsonl").read_text().splitlines()))
    assert known == [2, 2, 4]
    results = (tmp_path / "out" / "eval_results.json").read_text()
    assert '"motion_smoothness"' in results
