"""What is known of every video, on disk as soon as it is known."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from turbodiffusion.errors import UserError


@dataclass(frozen=True)
class Score:
    """A video's part in a dimension's score, which is the sum of totals over the sum of units.

    units: what is averaged, such as frames; 1 where every video counts the same, 0 where it does not count.
    extras: whatever else the leaderboard's files show.
    """

    total: float
    units: int = 1
    extras: dict[str, object] = field(default_factory=dict)

    @property
    def value(self) -> float | None:
        """The video's own score."""
        return self.total / self.units if self.units else None


@dataclass(frozen=True)
class Record:
    """A video in a dimension: its score, or why there is none.  key: of all that the score depends on."""

    key: str
    dimension: str
    video: str
    prompt: str
    score: Score | None
    failed: str | None = None


def key_of(*parts: object) -> str:
    """A short name for the values of everything that a score depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def stamp(path: Path) -> tuple[str, int, int]:
    """Changes with a file."""
    return path.name, path.stat().st_size, path.stat().st_mtime_ns


def read_records(files: Iterable[Path]) -> dict[str, Record]:
    """Records by key.  A last line that was cut off does not count; a success outlives a failure."""
    found: dict[str, Record] = {}
    for path in files:
        *lines, _ = path.read_bytes().split(b"\n")
        for i, line in enumerate(lines, 1):
            try:
                content = json.loads(line)
                score = None if content["score"] is None else Score(**content.pop("score"))
                record = Record(**{**content, "score": score})
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{path} line {i} is damaged; delete the line, to have it scored again"
                ) from error
            if record.score is not None or getattr(found.get(record.key), "score", None) is None:
                found[record.key] = record
    return found


def line_of(record: Record) -> str:
    """A record as JSON, to the last bit."""
    return json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n"


class Sink:
    """Appends records to a file of this process alone; one that was killed mid-line is mended first."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("ab+")
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def add(self, records: Iterable[Record]) -> None:
        """Write and wait until they are on disk."""
        self._file.write("".join(map(line_of, records)).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Give the file back."""
        self._file.close()
