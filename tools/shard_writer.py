"""Writing shards: by any number of processes, and stopped anywhere without losing more than one batch."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from distill.shard_files import WRITERS, Keyed, SafetensorsShard, write_safetensors
from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.video_io import write_json

RECORD = "data.json"
Make = Callable[[range], list[Keyed]]  # global sample numbers -> those samples, less any that are left out


@dataclass(frozen=True)
class ShardSet:
    """The files shard_NNNNNN of one folder; process `rank` of `world` writes every world-th of them.

    A batch is kept in a file of its own until its shard is complete, and always holds the same samples.  So
    neither interruptions nor the number of processes change a byte of the result.
    """

    folder: Path
    format: str  # of WRITERS
    samples: int
    per_shard: int
    batch: int
    text_only: bool = False
    rank: int = 0
    world: int = 1

    @property
    def files(self) -> list[Path]:
        """Every shard, this process's and the others'."""
        count = -(-self.samples // self.per_shard)
        return [self.folder / f"shard_{i:06d}.{self.format}" for i in range(count)]

    @property
    def own(self) -> dict[Path, range]:
        """This process's shards and the numbers of their samples."""
        files = list(enumerate(self.files))[self.rank :: self.world]
        edge = self.per_shard
        return {file: range(i * edge, min((i + 1) * edge, self.samples)) for i, file in files}

    def claim(self, record: dict[str, object]) -> None:
        """Note what the folder is made of; UserError if it already holds something else."""
        file, record = self.folder / RECORD, json.loads(json.dumps(record))
        if not file.exists():
            if next(self.folder.glob("shard_*"), None):
                raise UserError(f"{self.folder} holds shards of unknown making: pass another dst=")
            try:
                write_json(file, record)
            except UserError:
                if not file.exists():  # else another process was first
                    raise
        before = json.loads(file.read_text())
        for name in record.keys() | before.keys():
            if (old := before.get(name)) != (new := record.get(name)):
                raise UserError(
                    f"{self.folder} holds data with other {name} ({str(old)[:200]}, now {str(new)[:200]}): "
                    "repeat the command that began it, or pass another dst="
                )

    def write(self, make: Make, advance: Callable[[int], None]) -> None:
        """Make what is missing of this process's shards; advance hears of every sample done or found."""
        for file, numbers in self.own.items():
            if file.exists():
                advance(len(numbers))
                continue
            # what a killed process left
            for stale in self.folder.glob(f".{file.name}.*.part"):
                stale.unlink()
            parts = self._parts(file)
            for start in numbers[:: self.batch]:
                some = range(start, min(start + self.batch, numbers.stop))
                self._write_part(parts / f"{start:09d}.safetensors", some, make)
                advance(len(some))
            if any(parts.glob("*.safetensors")):
                WRITERS[self.format](file, self._samples(parts))
                shutil.rmtree(parts)

    def _parts(self, shard: Path) -> Path:
        return shard.with_name(f".{shard.stem}.parts")

    def _write_part(self, part: Path, numbers: range, make: Make) -> None:
        if not part.exists() and (samples := make(numbers)):
            for key, sample in samples:
                sample.checked(f"sample {key} ({sample.prompt!r})")
            write_safetensors(part, samples)

    def _samples(self, parts: Path) -> Iterator[Keyed]:
        for path in sorted(parts.glob("*.safetensors")):
            part = SafetensorsShard(path, text_only=self.text_only)
            for number, key in enumerate(part.keys):
                yield key, part.read(number)
