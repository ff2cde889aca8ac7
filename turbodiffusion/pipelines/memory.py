"""The memory plan: what a run will need, told before anything is loaded.

Weights are counted from the checkpoints' headers, activations estimated from shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import NamedTuple, get_args

import torch
import torch.distributed as dist

from turbodiffusion.errors import UserError
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.models.vae_tiling import TILE, decode_bytes, longest_chunk
from turbodiffusion.parallel import band_rows, least
from turbodiffusion.pipelines.offload import Offload

GIB = 2**30
# an accelerator's own: context, kernels, workspaces of the matrix libraries
RUNTIME = GIB // 2
# of one encoder run, over its weights
ENCODER_ACTIVATIONS = 0.05
# what decoding may take beyond the least it needs, where that is not known to be free
CHUNK_BYTES = 2**30


@dataclass(frozen=True)
class Stage:
    """One module at work: bytes of its weights, of what block mode keeps of them at once, and of the rest.

    constants: what steps keep for the next; streamed blocks keep nothing.
    """

    name: str
    weights: int
    streamed: int
    activations: int
    constants: int = 0


class Free(NamedTuple):
    """Free bytes; None where nobody can tell, or need not."""

    device: int | None
    host: int | None


@dataclass(frozen=True)
class Plan:
    """Peak bytes of every offload mode on the device, and what is free there and on the host."""

    stages: tuple[Stage, ...]
    offload: Offload
    tiled: bool
    free: int | None
    host_free: int | None

    def peak(self, mode: Offload) -> int:
        """Bytes on the device at the worst moment."""
        if mode == "none":
            most = max(stage.activations + stage.constants for stage in self.stages)
            return most + sum(stage.weights for stage in self.stages)
        if mode == "stage":
            return max(stage.weights + stage.activations + stage.constants for stage in self.stages)
        return max(stage.streamed + stage.activations for stage in self.stages)

    def fits(self, mode: Offload) -> bool:
        """Whether the mode's peak is free on the device, and its weights in host memory where they wait."""
        return (self.free is None or self.peak(mode) <= self.free) and self._fits_host(mode)

    def _fits_host(self, mode: Offload) -> bool:
        waiting = sum(stage.weights for stage in self.stages) if mode != "none" else 0
        return self.host_free is None or waiting <= self.host_free

    def verdict(self) -> str:
        """One sentence; UserError if the run can not fit."""
        need = f"{readable(self.peak(self.offload))} needed with offload={self.offload}"
        if self.free is None:
            return f"{need}; how much is free is unknown."
        need += f", {readable(self.free)} free"
        if self.fits(self.offload):
            return f"{need}: fits."
        if not self._fits_host(self.offload):
            need += f"; all weights wait in host memory, of which {readable(self.host_free or 0)} are free"
        others = [mode for mode in get_args(Offload) if self.fits(mode)]
        if others:
            raise UserError(f"this does not fit: {need}; pass offload={others[0]}.")
        tiling = "" if self.tiled else " tiling=true,"
        raise UserError(
            f"this does not fit: {need}, and no offload mode would do; pass{tiling} a smaller size= or fewer "
            "frames=."
        )


def denoise_bytes(
    config: dict[str, int], latents: tuple[int, int, int, int], dtype: torch.dtype, *, per_token: bool
) -> int:
    """Activations of one WanModel forward on latents (z, T, h, w), and the sampler's copies of these.

    per_token: each token has its own time, and so its own modulation.
    """
    z, t, h, w = latents
    tokens, e, dim = t * h * w // 4, dtype.itemsize, config["dim"]
    # residual, normalised input, q, k, v and their rotated copies; two fp32 temporaries of the rotation
    attention = 8 * e * dim + 8 * dim
    # residual, input, their difference, and the hidden layer before and after its activation
    feed_forward = 3 * e * dim + 2 * e * config["ffn_dim"]
    modulation = 4 * 7 * dim if per_token else 0
    sampler = 8 * 8 * z * t * h * w
    return tokens * (max(attention, feed_forward) + modulation) + sampler


def constant_bytes(config: dict[str, int], dtype: torch.dtype, networks: int) -> int:
    """Keys and values of a prompt and its negative, for each network, and the one copy that a graph reads."""
    tokens = config["text_length"] + config["clip_tokens"]
    return (2 * networks + 1) * 2 * config["layers"] * tokens * config["dim"] * dtype.itemsize


def streamed_text_bytes(config: dict[str, int], weights: int, dtype: torch.dtype) -> int:
    """What block mode keeps of a text encoder's weights: the embedding, and places for two blocks."""
    embedding = config["vocab"] * config["dim"] * dtype.itemsize
    return embedding + 2 * (weights - embedding) // config["layers"]


def vae_chunk(
    vae: VideoVAE,
    latents: Sequence[int],
    *,
    tiled: bool,
    free: int | None = None,
    ranks: dist.ProcessGroup | None = None,
) -> int:
    """How many latent frames the VAE takes at a time of latents (B, z, T, h, w), by memory.

    free: bytes of the device.  Half of what one frame at a time leaves of them may be taken: the rest may be
    in pieces.  The frames are the same; on a CPU a small clip decodes four times as fast whole as frame by
    frame.  ranks: who shares its rows; all get the same answer.
    """
    b, _, length, height, width = latents
    if tiled:
        height, width = min(height, TILE[0]), min(width, TILE[1])
    if ranks is not None:
        # one more, which is more than is borrowed at any level
        height = 1 + max(band_rows(height, ranks.size()), default=height)
    shape = (length, height, width)
    one, two = (decode_bytes(vae, shape, chunk=chunk) for chunk in (1, 2))
    spare = max(CHUNK_BYTES, ((free or 0) - b * one) // 2)
    most = min(1 + spare // max(1, b * (two - one)), longest_chunk(vae, (b, *shape[1:])))
    most = most if ranks is None else least(most, ranks)
    # as even as can be: a short last piece keeps a device less busy
    return ceil(length / ceil(length / most))


def free_memory(device: torch.device) -> Free:
    """What this process may still take now on the device and, where that is another memory, on the host."""
    host = host_memory()
    if device.type == "cpu":
        return Free(host, None)
    backend = torch.get_device_module(device)
    if not hasattr(backend, "mem_get_info"):
        return Free(None, host)
    free, whole = backend.mem_get_info(device)
    used = backend.memory_allocated(device)
    # what PyTorch holds and does not use is free to this process
    free += backend.memory_reserved(device) - used
    if hasattr(backend, "get_per_process_memory_fraction"):
        # of a number: it takes no "cuda" for the current one
        index = backend.current_device() if device.index is None else device.index
        free = min(free, int(backend.get_per_process_memory_fraction(index) * whole) - used)
    return Free(max(0, free - RUNTIME), host)


def readable(size: int) -> str:
    """Bytes as GiB or, below a tenth of one, MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def host_memory() -> int | None:
    """Bytes a process may still take on this machine (in this container); None if the system does not say."""
    free = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, StopIteration, ValueError):
        pass
    return min(free, default=None)
