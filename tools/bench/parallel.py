"""Time of what all cards share, beside one card's, at real size with random weights.

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node=2 -m tools.bench.parallel variant=wan2.1_t2v_14b layers=8 \
        size=832x480,1280x720 attention=dense,sla

times a forward, whose tokens they share, and part=vae the autoencoder's decoding and encoding, whose rows.
Efficiency is one card's time, as a share of what all cards spend.  What they share must first agree with one
card's answer on the same weights.  layers: fewer than the variant's, if all do not fit.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from tools.bench.forward import Options as Forward
from tools.bench.forward import attend, latent_size, network_inputs, random_network, shortened, twin
from tools.bench.timing import sizes
from tools.bench.vae import ALLOWED, random_vae
from tools.options import run
from turbodiffusion.errors import UserError
from turbodiffusion.parallel import joined, neighbours, own_device, split_rows, split_tokens, started
from turbodiffusion.pipelines.generate import latent_shape
from turbodiffusion.pipelines.memory import free_memory, vae_chunk
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.variants import Variant, variant

Call = Callable[[], Tensor]
# of a forward, relative: bf16 rounds at 0.4 %, here and there otherwise where products are cut elsewhere
FORWARD_ALLOWED = 3e-2


@dataclass
class Options(Forward):
    """The command line: that of tools.bench.forward; part: forward or vae."""

    part: str = "forward"
    layers: int | None = None


@torch.no_grad()
def report(options: Options, device: torch.device, cards: int, console: Console) -> None:
    """Every row of the part."""
    parts = {"forward": (forwards, FORWARD_ALLOWED), "vae": (coding, ALLOWED)}
    if options.part not in parts:
        raise UserError(f"part={options.part} is not one of {', '.join(parts)}")
    rows, allowed = parts[options.part]
    torch.manual_seed(0)  # the same weights and inputs everywhere
    for label, alone, shared in rows(options, variant(options.variant), device):
        _check(alone(), shared(), allowed)
        spent, peak = _time(alone, options.repeats, device)
        together, their_peak = _time(shared, options.repeats, device)
        console.print(
            f"{label}: {1e3 * spent:.1f} ms on 1, {1e3 * together:.1f} ms on {cards}: "
            f"{spent / together:.2f} x, efficiency {spent / together / cards:.0%}; "
            f"activations {peak:.2f} and {their_peak:.2f} GiB"
        )


def forwards(options: Options, row: Variant, device: torch.device) -> Iterator[tuple[str, Call, Call]]:
    """Of every size with every attention: a forward by one card, and by all."""
    network = random_network(shortened(row, options.layers), device, torch.bfloat16)
    shared = twin(network)
    split_tokens(shared, neighbours(dist.get_world_size()))
    for name in options.attention.split(","):
        for each in (network, shared):
            attend(each, name, options, options.ratio)
        for size in options.size.split(","):
            inputs = network_inputs(row, latent_size(row, size, options.frames), device)
            yield f"{size} {name}", partial(network, **inputs), partial(shared, **inputs)


def coding(options: Options, row: Variant, device: torch.device) -> Iterator[tuple[str, Call, Call]]:
    """Of every size: decoding and encoding by one card, and by all, each in the pieces of a pipeline."""
    vae, ranks = random_vae(row.vae, device), neighbours(dist.get_world_size())
    shared = twin(vae)
    split_rows(shared, ranks)
    free = None if device.type == "cpu" else free_memory(device).device
    for width, height in sizes(options.size):
        latents = torch.randn(1, *latent_shape(vae, options.frames, Size(width, height)), device=device)
        frames = torch.rand(1, 3, options.frames, height, width, device=device) * 2 - 1
        alone, together = (
            vae_chunk(vae, latents.shape, tiled=False, free=free, ranks=each) for each in (None, ranks)
        )
        for name, x in (("decode", latents), ("encode", frames)):
            label = f"{width}x{height} {name}, {alone} and {together} at a time"
            yield (
                label,
                partial(getattr(vae, name), x, chunk=alone),
                partial(getattr(shared, name), x, chunk=together),
            )


def _check(alone: Tensor, shared: Tensor, allowed: float) -> None:
    error = ((shared - alone).norm() / alone.norm()).item()
    if not error < allowed:
        raise UserError(f"what is shared differs from one card's answer by {error:.3f}: not timed")


def _time(call: Callable[[], Tensor], repeats: int, device: torch.device) -> tuple[float, float]:
    """The median of a call's seconds, of the slowest card each time, and its peak of memory in GiB."""
    is_gpu, seconds, before = device.type == "cuda", [], 0
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(repeats + 1):
        dist.barrier()
        begun = time.perf_counter()
        call()
        if is_gpu:
            torch.cuda.synchronize()
        spent = torch.tensor(time.perf_counter() - begun, device=device)
        dist.all_reduce(spent, dist.ReduceOp.MAX)
        seconds.append(spent.item())
    peak = torch.cuda.max_memory_allocated() - before if is_gpu else 0
    return statistics.median(seconds[1:]), peak / 2**30


def start(options: Options) -> None:
    """Join the others, build, time, print."""
    rank, cards = started()
    if cards == 1:
        raise UserError("this times several processes: start it by torchrun --nproc-per-node=2 -m")
    device = own_device(torch.device(options.device))
    with joined(device):
        report(options, device, cards, Console(width=150, quiet=rank > 0))


main = partial(run, Options, start)

if __name__ == "__main__":
    main()
