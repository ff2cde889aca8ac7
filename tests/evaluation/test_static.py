"""`python -m evaluation.static`: which videos are kept, and under which names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evaluation.static import Options, keep
from tests.evaluation.backbones.test_networks import saved


@pytest.mark.parametrize("moves", [False, True])
def test_the_first_five_static_videos_are_kept(
    moves: bool,
    tmp_path: Path,
    write_lossless: Callable[[Path, Tensor], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """RAFT with made-up numbers sees motion anywhere, and none where its last layer is zero."""
    state = torch.load(saved("raft", tmp_path))
    if not moves:
        state |= {name: torch.zeros_like(x) for name, x in state.items() if "flow_head.conv2" in name}
    torch.save(state, tmp_path / "raft-things.pth")
    made, out = tmp_path / "videos", tmp_path / "out"
    made.mkdir()
    cats = range(1 if moves else 6)
    for i in cats:
        write_lossless(made / f"a cat-{10 * i}.mp4", torch.full((2, 128, 128, 3), 20 * i).byte())
    write_lossless(made / "a dog. Or two-3.mp4", torch.zeros(2, 128, 128, 3).byte())
    (made / "a dog. Or two-4.mp4").write_bytes(b"no video")
    monkeypatch.setenv("COLUMNS", "200")  # a line is not broken
    keep(Options(str(made), str(out), str(tmp_path), "cpu"))
    said = capsys.readouterr().out
    assert "a dog. Or two-4.mp4 can not be read as a video" in said
    if moves:
        assert "a cat: 0 of 1 are static" in said
        assert not out.exists()
        return
    assert "a dog. Or two: 1 of 2 are static" in said
    assert "a cat" not in said
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    # in the order of names, as text
    wanted = {f"a cat-{i}.mp4": f"a cat-{10 * i}.mp4" for i in range(5)}
    wanted["a dog. Or two-0.mp4"] = "a dog. Or two-3.mp4"
    assert kept == {name: (made / source).read_bytes() for name, source in wanted.items()}
    # what is there is not looked at again
    for i in cats:
        (made / f"a cat-{10 * i}.mp4").write_bytes(b"no video")
    keep(Options(str(made), str(out), str(tmp_path), "cpu"))
    assert "a cat" not in capsys.readouterr().out
