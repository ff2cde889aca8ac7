"""Time of attention with its tangent on one GPU, the form that is shipped beside others, in bf16.

    python -m tools.bench.flash_jvp heads=12,40 length=32760 sweep=true

Every form must agree with fp64 on slices of its own output first.  CUDA events, the forms in turns, medians.
FLOP: 12 N L^2 D for the six products of a tangent pass, 4 N L^2 D for the two of a forward, 10 N L^2 D for
the five that a backward needs.  `share` is of the 790 TFLOP/s that matrix products reach on an H200.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels import flash_jvp_triton as flash
from kernels import reference
from kernels.flash_jvp_triton import Tile
from tools.bench.timing import gpu_console, measure
from tools.options import parse

CEILING = 790e12
# rows, keys, warps, stages
OTHERS = [(128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)]
FLOP = {"SDPA cuDNN forward": 4, "forward, no tangent": 4, "backward": 10}


@dataclass
class Options:
    """The command line."""

    heads: str = "12,40"
    length: int = 32760
    width: int = 128
    repeats: int = 5
    sweep: bool = False


def error(tensors: list[Tensor], o: Tensor, do: Tensor) -> float:
    """Largest error of o, do (1, L, N, D) relative to fp64: 64 rows at either end, first and last head."""
    worst = 0.0
    for head in (0, -1):
        for rows in (slice(0, 64), slice(-64, None)):
            q, k, v, dq, dk, dv = (x[:, :, head].double() for x in tensors)
            truth = reference.attention(q[:, rows], k, v, dq[:, rows], dk, dv)
            for got, wanted in ((o, truth[0]), (do, truth[2])):
                off = (got[:, rows, head].double() - wanted).norm() / wanted.norm()
                # a NaN must not pass for small
                worst = max(worst, torch.nan_to_num(off, nan=torch.inf).item())
    return worst


def passed(tensors: list[Tensor], tile: Tile | None, name: str, console: Console) -> bool:
    """Whether a form runs and agrees with fp64; says so, and why not."""
    start = time.perf_counter()
    try:
        torch.use_deterministic_algorithms(True)  # new memory holds NaN: what is not written cannot pass
        o, _, do = flash.run(tensors, tile)
        torch.cuda.synchronize()
    except (flash.triton.TritonError, RuntimeError) as reason:
        console.print(f"{name}: does not run: {str(reason).splitlines()[0][:150]}")
        return False
    finally:
        torch.use_deterministic_algorithms(False)
    first = time.perf_counter() - start
    off = error(tensors, o, do)
    good = off < 5e-3  # bf16 rounds at 2e-3 of a number's size, a few times on the way
    console.print(f"{name}: first use {first:.1f} s, error {off:.1e}{'' if good else ': WRONG, not timed'}")
    return good


def yardsticks(tensors: list[Tensor]) -> dict[str, Callable[[], object]]:
    """PyTorch's attention, and the forward and backward here, without tangents."""
    q, k, v = (x.transpose(1, 2) for x in tensors[:3])
    plain = [*tensors[:3], None, None, None]
    o, lse, _ = flash.attention(q, k, v, None, None, None)
    grad = torch.randn_like(o)

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v)

    return {
        "SDPA cuDNN forward": cudnn,
        "forward, no tangent": lambda: flash.run(plain, flash.form(plain)),
        "backward": lambda: flash.attention_backward(q, k, v, o, lse, grad),
    }


@torch.no_grad()
def main() -> None:
    """Gate, time, print."""
    options = parse(Options, sys.argv[1:])
    console = gpu_console(f"width {options.width}, bf16")
    for heads in map(int, options.heads.split(",")):
        size = (1, options.length, heads, options.width)
        tensors = [torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
        shipped = flash.form(tensors)
        tiles = [shipped, *(Tile(*tile) for tile in OTHERS if options.sweep)]
        names = {f"tile {tuple(tile)}" if tile else "Hopper's own kernel": tile for tile in tiles}
        forms = {name: tile for name, tile in names.items() if passed(tensors, tile, name, console)}
        runs = {name: partial(flash.run, tensors, tile) for name, tile in forms.items()}
        for name, times in measure(runs | yardsticks(tensors), options.repeats).items():
            ms = statistics.median(times)
            rate = FLOP.get(name, 12) * heads * options.length**2 * options.width / ms * 1e3
            spread = f"{min(times):.2f} to {max(times):.2f}"
            console.print(
                f"{heads} heads x {options.length}, {name}: {ms:.2f} ms ({spread}), "
                f"{rate / 1e12:.0f} TFLOP/s, share {rate / CEILING:.2f}"
            )


if __name__ == "__main__":
    main()
