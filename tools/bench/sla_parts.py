"""Time of what sparse-linear attention needs beside its sparse attention, on one GPU, in bf16.

    python -m tools.bench.sla_parts heads=12,40 tokens=32760,75600

The block map, and the linear branch that adds the sparse one's output, alone and with its gradients, each
against plain PyTorch and only if it agrees with fp64.  CUDA events around a few calls, in turns, medians.
The floor is what must be read and written once, at the 4.3 TB/s that an H200's memory reaches.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from torch import Tensor

from kernels import linear_attention_triton, reference
from kernels.block_map import block_map
from kernels.linear_attention import linear_attention, plain
from tools.bench.flash_jvp import measure
from tools.options import parse
from turbodiffusion.errors import UserError

BANDWIDTH = 4.3e12
# of all tokens: q and k; q, k, v, what is added and the output; that, q, k, v, g and three gradients
TENSORS = {"block map": 2, "linear branch": 5, "linear branch and gradients": 12}


@dataclass
class Options:
    """The command line.  tile: tokens, warps, stages of every kernel of the linear branch, to try others."""

    heads: str = "12,40"
    tokens: str = "32760,75600"
    width: int = 128
    block_q: int = 64
    block_k: int = 64
    ratio: float = 0.1
    repeats: int = 10
    calls: int = 5
    tile: str = ""
    profile: bool = False


def block_means(x: Tensor, size: int) -> Tensor:
    """(B, N, L, D) -> (B, N, blocks, D)."""
    return torch.stack([part.mean(-2) for part in x.split(size, dim=-2)], dim=-2)


def map_error(inputs: dict[str, Tensor], blocks: dict[str, int], ratio: float) -> float:
    """By how much any block outscores one that is kept for it, of the largest score, in fp64; two heads."""
    q, k = (inputs[name][:, [0, -1]].double() for name in "qk")
    index = block_map(inputs["q"], inputs["k"], **blocks, ratio=ratio)[:, [0, -1]]
    mean_k = block_means(k - k.mean(-2, keepdim=True), blocks["block_k"])
    scores = block_means(q, blocks["block_q"]) @ mean_k.mT
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index.long(), value=True)
    gap = scores.masked_fill(kept, -torch.inf).amax(-1) - scores.masked_fill(~kept, torch.inf).amin(-1)
    return (gap.amax() / scores.abs().amax()).item()


def differentiate(form: Callable[..., Tensor], inputs: dict[str, Tensor], grad: Tensor) -> list[Tensor]:
    """The linear branch and the gradients of all its inputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with torch.enable_grad():
        out = form(**leaves, feature_map="softmax")
    return [out, *torch.autograd.grad(out, list(leaves.values()), grad)]


def branch_error(inputs: dict[str, Tensor], grad: Tensor) -> float:
    """Error of the linear branch and its gradients relative to fp64; first and last head."""
    worst = 0.0
    for head in (slice(0, 1), slice(-1, None)):
        sliced = {name: x[:, head] if x.ndim == 4 else x for name, x in inputs.items()}
        got = differentiate(linear_attention, sliced, grad[:, head])
        wide = {name: x.double() for name, x in sliced.items()}
        for ours, truth in zip(got, differentiate(plain, wide, grad[:, head].double()), strict=True):
            # a NaN must not pass for small
            off = torch.nan_to_num((ours - truth).norm() / truth.norm(), nan=torch.inf).item()
            worst = max(worst, off)
    return worst


def runs(
    inputs: dict[str, Tensor], grad: Tensor, blocks: dict[str, int], ratio: float
) -> dict[str, Callable[[], object]]:
    """Every part and its eager form, under the names of TENSORS."""
    maps = {"": block_map, ", eager": reference.block_map}
    branches = {"": linear_attention, ", eager": plain}
    named: dict[str, Callable[[], object]] = {}
    for suffix, fn in maps.items():
        named["block map" + suffix] = partial(fn, inputs["q"], inputs["k"], **blocks, ratio=ratio)
    for suffix, fn in branches.items():
        named["linear branch" + suffix] = partial(fn, **inputs, feature_map="softmax")
        named["linear branch and gradients" + suffix] = partial(differentiate, fn, inputs, grad)
    return named


def repeated(fn: Callable[[], object], calls: int) -> None:
    """Several calls, so that launching the first is hidden behind running the others."""
    for _ in range(calls):
        fn()


def compare(heads: int, tokens: int, options: Options, console: Console) -> None:
    """Gate, time and print one size."""
    size, gpu = (1, tokens, heads, options.width), {"device": "cuda", "dtype": torch.bfloat16}
    # tokens first in memory, as projections leave them
    *drawn, grad = (torch.randn(size, **gpu).transpose(1, 2) for _ in range(5))
    inputs = dict(zip(("q", "k", "v", "add"), drawn, strict=True))
    inputs |= {
        "weight": torch.randn(options.width, options.width, **gpu),
        "bias": torch.randn(options.width, **gpu),
    }
    blocks = {"block_q": options.block_q, "block_k": options.block_k}
    # fp32 scores, and a few bf16 roundings of 2e-3
    errors = {"map": map_error(inputs, blocks, options.ratio), "branch": branch_error(inputs, grad)}
    console.print(f"{heads} heads x {tokens}: errors {errors}")
    if not (errors["map"] < 1e-5 and errors["branch"] < 1e-2):
        raise UserError(f"wrong, so not timed: {errors}")
    named = runs(inputs, grad, blocks, options.ratio)
    if options.profile:
        with torch.profiler.profile() as profile:
            repeated(named["block map"], options.calls)
            repeated(named["linear branch and gradients"], options.calls)
        console.print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=20))
    times = measure(
        {name: partial(repeated, fn, options.calls) for name, fn in named.items()}, options.repeats
    )
    for part, tensors in TENSORS.items():
        ours, eager = ([ms / options.calls for ms in times[part + suffix]] for suffix in ("", ", eager"))
        ms, floor = statistics.median(ours), 1e3 * tensors * 2 * grad.numel() / BANDWIDTH
        console.print(
            f"{heads} heads x {tokens}, {part}: {ms:.3f} ms ({min(ours):.3f} to {max(ours):.3f}), "
            f"floor {floor:.3f}, share {floor / ms:.2f}; eager {statistics.median(eager):.3f} ms"
        )


@torch.no_grad()
def main() -> None:
    """Every size that was asked for."""
    options = parse(Options, sys.argv[1:])
    if not torch.cuda.is_available():
        raise UserError("this times a GPU and there is none here; the tests in tests/kernels run without")
    console = Console(width=150)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, width {options.width}, bf16")
    if options.tile:
        tile = linear_attention_triton.Tile(*map(int, options.tile.split(",")))
        linear_attention_triton.TILES = dict.fromkeys(linear_attention_triton.TILES, tile)
    for heads in map(int, options.heads.split(",")):
        for tokens in map(int, options.tokens.split(",")):
            compare(heads, tokens, options, console)


if __name__ == "__main__":
    main()
