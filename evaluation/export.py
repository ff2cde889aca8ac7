"""The leaderboard's own files: result JSON and submission zip, written and read.

    python -m evaluation.export runs=[run,...] dst=submission.zip

gathers finished runs of `python -m evaluation prompts=VBench_full_info.json` that together have all 16
dimensions.
"""

import json
import math
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from evaluation.command import run
from evaluation.prompts import parse_name
from evaluation.records import Record, Score
from evaluation.vbench import DIMENSIONS, T2V
from turbodiffusion.checkpoints.files import appearing
from turbodiffusion.errors import UserError

RESULTS, UPSTREAM = "results.json", "eval_results.json"


@dataclass
class Options:
    """The command line."""

    runs: list[str] = field(default_factory=list)
    dst: str = MISSING


def upstream(records: Iterable[Record], raw: Mapping[str, float], folder: Path) -> dict[str, list]:
    """The content of a result file: `{dimension: [score, [{video_path, video_results, ...}]]}`."""
    content: dict[str, list] = {name: [raw[name], []] for name in raw if name in DIMENSIONS}
    for record in records:
        if record.dimension in content and record.score is not None and record.score.units:
            dimension = DIMENSIONS[record.dimension]
            value = record.score.value * dimension.scale
            entry = {
                "video_path": str(folder / record.video),
                "video_results": bool(value) if dimension.is_boolean else value,
            }
            content[record.dimension][1].append(entry | record.score.extras)
    return content


def read_upstream(path: Path) -> list[Record]:
    """The videos' scores in a result JSON or in all those of a zip, every video counting the same.

    Upstream does not say how many frames a video had.  UserError if the file is neither.
    """
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as file:
                texts = [file.read(name) for name in file.namelist() if name.endswith(".json")]
        else:
            texts = [path.read_bytes()]
        merged = {name: result for text in texts for name, result in json.loads(text).items()}
        scales = {name: DIMENSIONS[name].scale for name in merged}
        return [_record(name, each, scales[name]) for name, result in merged.items() for each in result[1]]
    except (OSError, zipfile.BadZipFile, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path} holds no results of VBench: {error}") from error


def _record(dimension: str, video: dict, scale: float) -> Record:
    path, value = Path(video["video_path"]), float(video["video_results"]) / scale
    return Record(path.name, dimension, path.name, parse_name(path.stem)[0], Score(value))


def pack(options: Options) -> None:
    """Write a submission of finished runs; UserError lists all that keeps them from being one."""
    if not options.runs:
        raise UserError("runs=[run,...] must name a finished run of python -m evaluation")
    content: dict[str, list] = {}
    wrong = []
    for folder in (Path(each).expanduser() for each in options.runs):
        try:
            results = json.loads((folder / RESULTS).read_text())
            content |= json.loads((folder / UPSTREAM).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is no finished run of python -m evaluation: {error}") from error
        wrong += [f"{folder}: {note}" for note in results["notes"]]
    wrong += [
        f"{name} is missing" for name in T2V.totals({name: each[0] for name, each in content.items()}).missing
    ]
    for name, (raw, videos) in content.items():
        values = [raw, *(float(each["video_results"]) / DIMENSIONS[name].scale for each in videos)]
        if outside := [value for value in values if not math.isfinite(value) or not -1 <= value <= 1]:
            wrong.append(f"{name} has the value {outside[0]}")
    if wrong:
        raise UserError(f"this is no submission yet: {'; '.join(wrong)}")
    dst = Path(options.dst).expanduser()
    with appearing(dst) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(UPSTREAM, json.dumps(content, indent=2, allow_nan=False))


if __name__ == "__main__":
    run(Options, pack)
