import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.tracking import Tracking
from distill.trainer import Trainer
from turbodiffusion.errors import UserError


def test_no_project_needs_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # any import of it now raises
    assert Tracking(None).start(tmp_path / "run", {}) is None
    assert not (tmp_path / "run").exists()


def test_missing_package_and_unknown_mode_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Tracking("videos")
    with pytest.raises(UserError, match="wandb_mode=quiet"):
        Tracking(None, "quiet")


def test_resumed_run_goes_on_in_the_same_offline_run(tmp_path: Path, toy: Callable[..., Trainer]):
    pytest.importorskip("wandb")
    tracking, folder = Tracking("videos", "offline"), tmp_path / "toy"
    for steps in (4, 6):
        toy(steps=steps, tracker=tracking.start(folder, {"steps": steps})).fit()
    ids = {path.stem.removeprefix("run-") for path in folder.glob("wandb/offline-run-*/*.wandb")}
    assert ids == {(folder / "wandb_id").read_text()}
    pictures = {path.name.split("_")[1] for path in folder.glob("wandb/*/files/media/images/preview_*.png")}
    assert len(pictures) == 2
