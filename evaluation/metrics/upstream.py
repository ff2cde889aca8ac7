"""VBench's dimensions that need its detectors, seen by an installed vbench in an interpreter of its own."""

import json
import os
import shutil
import subprocess
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from evaluation.metrics.score import VideoMetric
from evaluation.records import Score
from evaluation.videos import Footage
from turbodiffusion.errors import UserError

# by dimension, the weights of its network
DETECTED = {
    **dict.fromkeys(("object_class", "multiple_objects", "color", "spatial_relationship"), "grit"),
    "scene": "tag2text",
}
HOW = (
    "python3.10 -m venv ENV && ENV/bin/pip install vbench==0.1.5 'torch<2.6' torchvision, then "
    "ENV/bin/pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2, "
    "then upstream=ENV/bin/python"
)
_DRIVER = Path(__file__).with_name("upstream_driver.py")


@dataclass(frozen=True)
class Upstream:
    """python: an interpreter that has vbench.  logs: the folder for what it says, a file a dimension."""

    python: str
    logs: Path

    def start(self, names: Iterable[str], log: int | IO[bytes]) -> subprocess.Popen:
        """Its process, that imports these dimensions; log: where what it says goes."""
        python = shutil.which(Path(self.python).expanduser())
        if python is None:
            raise UserError(f"upstream={self.python} is no interpreter; to make one: {HOW}")
        command = [os.path.abspath(python), str(_DRIVER), *names]
        return subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    def check(self, names: Iterable[str]) -> None:
        """UserError if it can not import these dimensions."""
        with self.start(names, subprocess.PIPE) as process:
            said = process.communicate()[1]
        if process.returncode:
            raise UserError(
                f"upstream={self.python} has no working vbench ({_last(said)}); to make one: {HOW}"
            )


class Detected(VideoMetric):
    """One of DETECTED.  Its process starts with the first video, and lives as long as this."""

    def __init__(self, name: str, files: Mapping[str, Path], upstream: Upstream) -> None:
        self.name, self.weights = name, (DETECTED[name],)
        super().__init__(files)
        self._upstream, self._log = upstream, upstream.logs / f"{name}.log"
        self._process: subprocess.Popen | None = None

    def score(self, footage: Footage) -> Score:
        """Upstream reads the file itself."""
        prompt = footage.video.prompt
        if self.name not in prompt.auxiliary:
            raise UserError(f"belongs to a prompt whose auxiliary_info names no {self.name}")
        asked = {"prompt": prompt.text, "video_list": [str(footage.video.path.absolute())]}
        try:
            if self._process is None:
                self._start(str(footage.pixels.device))
            self._tell(asked | {"auxiliary_info": prompt.auxiliary[self.name]})
            answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:  # a broken pipe, or an empty line
            self._process.wait()  # for its last words
            said = _last(self._log.read_bytes())
            raise UserError(f"has no {self.name}, as upstream's ended: {said} ({self._log})") from error
        if "failed" in answer:
            raise UserError(f"fails in upstream's {self.name}: {answer['failed']} ({self._log})")
        # upstream leaves out a video that does not show the object whose color is asked for
        return _counted(*answer["results"]) if answer["results"] else Score(0.0, 0)

    def _start(self, device: str) -> None:
        network = str(self.files[DETECTED[self.name]])
        submodules = {"model_weight": network}
        if DETECTED[self.name] == "tag2text":
            submodules = {"pretrained": network, "image_size": 384, "vit": "swin_b"}
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = self._upstream.start([self.name], log)
        weakref.finalize(self, _end, self._process)
        self._tell({"device": device, "submodules": submodules})

    def _tell(self, content: Mapping[str, object]) -> None:
        self._process.stdin.write(json.dumps(content).encode() + b"\n")


def _counted(video: dict) -> Score:
    """What is averaged over all videos: their frames, or the videos themselves."""
    extras = {name: each for name, each in video.items() if name not in ("video_path", "video_results")}
    if "frame_count" in video:
        return Score(video["success_frame_count"], video["frame_count"], extras)
    if "frame_results" in video:
        return Score(sum(video["frame_results"]), len(video["frame_results"]), extras)
    return Score(video["video_results"], extras=extras)


def _last(said: bytes) -> str:
    """The last line."""
    return (said.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]


def _end(process: subprocess.Popen) -> None:
    with process:
        process.kill()
