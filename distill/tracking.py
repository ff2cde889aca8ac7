"""Mirroring a run's log to Weights & Biases, which is imported only where that is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from uuid import uuid4

from turbodiffusion.errors import UserError

MODES = ("online", "offline", "disabled")


@dataclass(frozen=True)
class Tracking:
    """The project to mirror a run to, None: nowhere.  Raises UserError where that can not be done."""

    project: str | None
    mode: str = "online"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"wandb_mode={self.mode}: choose {', '.join(MODES)}")
        try:
            # a folder `wandb` of runs can be imported, too
            _ = self.project is None or import_module("wandb").init
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"wandb={self.project} needs the package wandb: pip install wandb, or leave wandb=null"
            ) from error

    def start(self, folder: Path, config: Mapping[str, object]) -> "Tracker | None":
        """Begin to mirror the run in `folder`, or go on with it."""
        return None if self.project is None else Tracker(self.project, self.mode, folder, config)


class Tracker:
    """A run of Weights & Biases; its id lies in the folder, so that who resumes the one resumes the other."""

    def __init__(self, project: str, mode: str, folder: Path, config: Mapping[str, object]):
        self.wandb, file = import_module("wandb"), folder / "wandb_id"
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.write_text(uuid4().hex)
        given = {"project": project, "mode": mode, "config": dict(config), "dir": str(folder)}
        self.run = self.wandb.init(**given, name=folder.name, id=file.read_text(), resume="allow")
        # wandb's own count refuses the steps that a resumed run repeats
        self.run.define_metric("*", step_metric="step")

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Mirror a line of the log."""
        self.run.log({"step": step, **values})

    def show(self, step: int, picture: Path) -> None:
        """Mirror a preview."""
        self.run.log({"step": step, "preview": self.wandb.Image(str(picture))})

    def finish(self, *, failed: bool) -> None:
        """Wait until everything has arrived."""
        self.run.finish(exit_code=int(failed))
