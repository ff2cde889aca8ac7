"""Training clips from shards: one seeded order over all samples of all files, that can be entered anywhere.

Shapes: B samples of a batch; the rest as in shard_files.py.
"""

import warnings
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from distill.conditioning import Example
from distill.data import Shuffle
from distill.shard_files import SHARDS, Sample, Shard, find_shards
from turbodiffusion.errors import UserError


@dataclass
class ShardedClips:
    """Endless batches of samples from shards (a folder or a pattern), drawn without replacement.

    All ranks agree on one stream: epoch after epoch a permutation of all N samples, made from (seed, epoch).
    Batch `number` is its places number * count ..., so each sample comes exactly once in N places, a batch
    may straddle two epochs, and to resume is to ask for the next number.

    frames: latent frames that are used, None for all.  text_only: prompts alone, with zeros of `latent_shape`
    (C, T, h, w) for clips.  skip_broken: the next sample, and a warning, in place of a damaged one.
    """

    path: str
    count: int  # samples of a batch
    seed: int
    frames: int | None = None
    text_only: bool = False
    latent_shape: Sequence[int] | None = None
    skip_broken: bool = False
    ahead: int = 4  # batches that are read while one is used, each by a thread
    every: int = 1  # as far apart are the numbers that this rank asks for: what is read ahead
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        for name, least in {"count": 1, "frames": 1, "ahead": 0, "every": 1}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"{name}={value}: it must be at least {least}")
        if self.text_only != (self.latent_shape is not None):
            raise UserError("text_only=true and latent_shape=[C,T,h,w] go together: give both or neither")
        files = find_shards(self.path)
        with ThreadPoolExecutor() as pool:
            opened = pool.map(lambda file: SHARDS[file.suffix](file, text_only=self.text_only), files)
            self.shards: list[Shard] = list(opened)
        self.ends = list(accumulate(len(shard.keys) for shard in self.shards))
        if not len(self):
            raise UserError(f"{self.path}: {len(files)} shards hold no sample; fetch or make them again")
        self.shuffle = Shuffle(len(self), self.seed)
        # threads: reading and copying release the interpreter, and no process has to be started or fed
        self._pool = ThreadPoolExecutor(max(1, self.ahead))
        self._reading: dict[int, Future[Example]] = {}

    def __len__(self) -> int:
        """Samples of an epoch, N."""
        return self.ends[-1]

    def batch(self, number: int) -> Example:
        """Batch `number`, on the device; the next ones are being read meanwhile."""
        wanted = range(number, number + (1 + self.ahead) * self.every, self.every)
        for other in self._reading.keys() - set(wanted):
            self._reading.pop(other).cancel()
        for other in wanted:
            if other not in self._reading:
                self._reading[other] = self._pool.submit(self._load, self.samples(other))
        example = self._reading.pop(number).result()
        tensors = {name: x for name, x in vars(example).items() if isinstance(x, Tensor)}
        return replace(example, **{name: x.to(self.device) for name, x in tensors.items()})

    def samples(self, number: int) -> list[int]:
        """Which samples batch `number` is made of, counted over the sorted shards."""
        return self.shuffle.indices(number * self.count, self.count).tolist()

    def read(self, index: int) -> tuple[str, Sample]:
        """Where sample `index` is, and the sample, as it is used."""
        place = bisect_right(self.ends, index)
        shard = self.shards[place]
        number = index - self.ends[place] + len(shard.keys)
        where = f"{shard.path}, sample {shard.keys[number]}"
        sample = shard.read(number)
        if self.frames is None or sample.latents is None:
            return where, sample
        if (length := sample.latents.shape[1]) < self.frames:
            raise UserError(f"{where} has {length} latent frames, wanted frames={self.frames}: ask for fewer")
        condition = None if sample.condition is None else sample.condition[:, : self.frames]
        return where, replace(sample, latents=sample.latents[:, : self.frames], condition=condition)

    def _load(self, indices: list[int]) -> Example:
        """The batch of these samples."""
        places, samples = zip(*map(self._read_or_next, indices), strict=True)
        rows = [sample.tensors() for sample in samples]
        for where, row in zip(places, rows, strict=True):
            if (got := _shapes(row)) != (wanted := _shapes(rows[0])):
                raise UserError(f"{where} holds {got}, but {places[0]} {wanted}: a batch takes one kind")
        stacked: dict[str, Tensor] = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        if self.text_only:
            stacked["latents"] = stacked["context"].new_zeros(len(rows), *self.latent_shape)
        return Example(**stacked, has_clips=not self.text_only)

    def _read_or_next(self, index: int) -> tuple[str, Sample]:
        for other in range(index, index + len(self)):
            try:
                return self.read(other % len(self))
            except UserError as error:
                if not self.skip_broken:
                    raise
                warnings.warn(f"skipped: {error}", stacklevel=2)
        raise UserError(f"{self.path}: none of the {len(self)} samples can be used; make them again")


def _shapes(row: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in row.items()}
