"""Noise that depends on a sample's own seed and on nothing else."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from turbodiffusion.errors import UserError

# torch's CPU generator reads 32 bits of a seed: larger ones would repeat the noise of smaller ones
SEEDS = range(2**32)


class SampleNoise:
    """One CPU generator per sample, so that its noise is the same in any batch and on any device.

    Raises UserError for a seed outside SEEDS.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], *, device: torch.device | str = "cpu"):
        for seed in seeds:
            if seed not in SEEDS:
                raise UserError(f"seed={seed}: take a whole number from 0 to {SEEDS[-1]}")
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.shape = tuple(shape)
        self.device = torch.device(device)
        # the copy then waits for the GPU's work in its place, and the host for none of it
        self.is_pinned = self.device.type == "cuda"
        self._begun: Future[Tensor] | None = None

    def begin(self) -> None:
        """Start the next draw, beside what the caller does: a large clip's takes 50 ms."""
        pool = ThreadPoolExecutor(1)
        self._begun = pool.submit(self._draw)
        pool.shutdown(wait=False)

    def draw(self) -> Tensor:
        """N(0, 1), (B, *shape), fp32; each call continues every sample's own stream."""
        noise, self._begun = self._draw() if self._begun is None else self._begun.result(), None
        return noise.to(self.device, non_blocking=self.is_pinned)

    def _draw(self) -> Tensor:
        """On the CPU."""
        shape = (len(self.generators), *self.shape)
        noise = torch.empty(shape, dtype=torch.float32, device="cpu", pin_memory=self.is_pinned)
        for sample, generator in zip(noise, self.generators, strict=True):
            sample.normal_(generator=generator)
        return noise
