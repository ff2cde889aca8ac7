"""Time of one forward whose tokens all cards share, beside one card's, at real size with random weights.

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node=2 -m tools.bench.parallel variant=wan2.1_t2v_14b layers=8 \
        size=832x480,1280x720 attention=dense,sla

Efficiency is one card's time, as a share of what all cards spend.  What they share must first agree with one
card's answer on the same weights.  layers: fewer than the variant's, if all do not fit.
"""

import statistics
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from tools.bench.forward import Options as Forward
from tools.bench.forward import attend, latent_size, network_inputs, random_network
from tools.options import parse
from turbodiffusion.cli import one_sentence
from turbodiffusion.errors import UserError
from turbodiffusion.parallel import joined, neighbours, own_device, split_tokens, started
from turbodiffusion.variants import variant


@dataclass
class Options(Forward):
    """The command line: that of tools.bench.forward."""

    layers: int | None = None


@torch.no_grad()
def report(options: Options, device: torch.device, cards: int, console: Console) -> None:
    """Every size with every attention."""
    row = variant(options.variant)
    row = replace(row, network=row.network | ({} if options.layers is None else {"layers": options.layers}))
    torch.manual_seed(0)  # the same weights and inputs everywhere
    network = random_network(row, device, torch.bfloat16)
    shared = deepcopy(network, {id(p): p for p in network.parameters()})
    split_tokens(shared, neighbours(cards))
    for name in options.attention.split(","):
        for each in (network, shared):
            attend(each, name, options, options.ratio)
        for size in options.size.split(","):
            inputs = network_inputs(row, latent_size(row, size, options.frames), device)
            _check(network(**inputs), shared(**inputs))
            alone, peak = _time(partial(network, **inputs), options.repeats, device)
            together, their_peak = _time(partial(shared, **inputs), options.repeats, device)
            console.print(
                f"{size} {name}: {1e3 * alone:.1f} ms on 1, {1e3 * together:.1f} ms on {cards}: "
                f"{alone / together:.2f} x, efficiency {alone / together / cards:.0%}; "
                f"activations {peak:.2f} and {their_peak:.2f} GiB"
            )


def _check(alone: Tensor, shared: Tensor) -> None:
    error = ((shared - alone).norm() / alone.norm()).item()
    # bf16 rounds at 0.4 %, here and there otherwise where products are cut elsewhere
    if not error < 3e-2:
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


def main() -> None:
    """Join, build, time, print."""
    with one_sentence():
        options, (rank, cards) = parse(Options, sys.argv[1:]), started()
        if cards == 1:
            raise UserError("this times several processes: start it by torchrun --nproc-per-node=2 -m")
        device = own_device(torch.device(options.device))
        with joined(device):
            report(options, device, cards, Console(width=150, quiet=rank > 0))


if __name__ == "__main__":
    main()
