"""Time of what a block computes around its 8-bit linear layers on one GPU, beside the same in other numbers.

    python -m tools.bench.int8_block tokens=32760,75600 sizes=1536x8960,5120x13824

Sizes are width x feed-forward width.  A network's own functions run, once with layers in bf16 and once in
8 bits; `fp8` has PyTorch's products of e4m3 numbers, with a scale for each token and channel, which it finds
op by op; `compiled` is torch.compile of either.  CUDA events around a few calls, in turns, medians.
Floors are of an H200: 1,580 TOP/s, and every tensor between kernels written and read at 4.3 TB/s.
"""

import statistics
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from torch import Tensor, nn

from kernels.reference import E4M3_MAX
from kernels.selftest import poisoned
from tools.bench.int8_linear import PACE
from tools.bench.timing import BANDWIDTH, gpu_console, measure, repeated
from tools.options import parse
from turbodiffusion.errors import UserError
from turbodiffusion.models.int8 import Int8Linear
from turbodiffusion.models.projections import add_projected, modulated, projected

BF16 = torch.bfloat16
# of Gaussian numbers int8 loses 1.3e-2 of a product and e4m3 3.8e-2, here of a branch as large as what it is
# added to, or two in a row; anything wrong is off by more
ALLOWED = 0.06


@dataclass
class Options:
    """The command line."""

    tokens: str = "32760,75600"
    sizes: str = "1536x8960,5120x13824"
    repeats: int = 7
    calls: int = 5


class ScaledLinear(nn.Module):
    """A linear layer by PyTorch's product of e4m3 numbers."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.scale = _to_e4m3(linear.weight.detach())
        self.bias = linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = _to_e4m3(x.flatten(0, -2))
        y = torch._scaled_mm(
            rows,
            self.weight.mT,
            scale_a=scale,
            scale_b=self.scale.mT,
            bias=self.bias,
            out_dtype=BF16,
            use_fast_accum=True,
        )
        return y.view(*x.shape[:-1], -1)


class Layers(nn.Module):
    """Those of a block that read and write video tokens, and what is done with them."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.gelu = nn.GELU(approximate="tanh")
        for layer in (self.q, self.k, self.v, self.o, self.up, self.down):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def qkv(self, x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        """Norm, modulation, q, k and v."""
        layers = self.q, self.k, self.v
        return tuple(projected(modulated(x, shift, scale, *layers), *layers))

    def out(self, x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        """o and its gated sum."""
        return (add_projected(x, y, self.o, gate),)

    def ffn(self, x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        """Norm, modulation, feed-forward and its gated sum."""
        h = self.gelu(self.up(modulated(x, shift, scale, self.up)))
        return (add_projected(x, h, self.down, gate),)


# of each: products a token, and bytes between kernels, both in the width E and the inner width I.  x to int8
# and back, three outputs; y to int8 and back, x, the sum; both, and bf16 to int8 and back
WORK: dict[str, tuple[Callable[[int, int], int], Callable[[int, int], int]]] = {
    "qkv": (lambda E, I: 3 * E * E, lambda E, I: (2 + 1 + 1 + 6) * E),
    "out": (lambda E, I: E * E, lambda E, I: (2 + 1 + 1 + 2 + 2) * E),
    "ffn": (lambda E, I: 2 * E * I, lambda E, I: (2 + 1 + 1 + 2 + 2) * E + (2 + 2 + 1 + 1) * I),
}


def _to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(1, keepdim=True) / E4M3_MAX
    return (x / scale).to(torch.float8_e4m3fn), scale


def in_numbers(layers: Layers, make: Callable[[nn.Linear], nn.Module]) -> Layers:
    """The same with other linear layers."""
    other = deepcopy(layers)
    for name, child in layers.named_children():
        if isinstance(child, nn.Linear):
            setattr(other, name, make(child))
    if isinstance(other.up, Int8Linear):
        other.up.gelu, other.gelu = True, nn.Identity()
    return other


def report(tokens: int, width: int, inner: int, options: Options, console: Console) -> None:
    """Check, time in turns and print; bf16 is the yardstick."""
    with torch.device("cuda"):
        floats = Layers(width, inner).to(BF16)
        inputs = [torch.randn(1, tokens, width, dtype=BF16) for _ in range(2)]
        inputs += [torch.randn(1, 1, width) for _ in range(3)]
    kinds = {"bf16": floats, "int8": in_numbers(floats, Int8Linear.from_linear)}
    if torch.cuda.get_device_capability() >= (8, 9):
        kinds["fp8"] = in_numbers(floats, ScaledLinear)
    for name, (products, moved) in WORK.items():
        runs = {kind: partial(getattr(layers, name), *inputs) for kind, layers in kinds.items()}
        for kind in runs.keys() - {"int8"}:
            compiled = torch.compile(getattr(kinds[kind], name), dynamic=False)
            runs[f"{kind} compiled"] = partial(compiled, *inputs)
        truth = [y.float() for y in getattr(floats, name)(*inputs)]
        for kind, run in runs.items():
            with poisoned():
                outputs = run()
            errors = [((y - t).norm() / t.norm()).item() for y, t in zip(outputs, truth, strict=True)]
            if not max(errors) < ALLOWED:
                raise UserError(f"{name}, {kind}: off by {max(errors):.3f}, so not timed")
        floor = 1e3 * tokens * (2 * products(width, inner) / PACE + moved(width, inner) / BANDWIDTH)
        console.print(f" {name}: floor {floor:.3f} ms")
        calls = {kind: partial(repeated, run, options.calls) for kind, run in runs.items()}
        spent = measure(calls, options.repeats)
        medians = {kind: statistics.median(times) / options.calls for kind, times in spent.items()}
        for kind, ms in medians.items():
            low, high = (pick(spent[kind]) / options.calls for pick in (min, max))
            ratio = f"int8 is {ms / medians['int8']:.2f} x as fast"
            console.print(f"  {kind}: {ms:.3f} ms ({low:.3f} to {high:.3f}), {ratio}")


@torch.no_grad()
def main() -> None:
    """Gate, time, print."""
    options = parse(Options, sys.argv[1:])
    console = gpu_console("targets: int8 ffn 1.5 x fp8, 1.2 x fp8 compiled")
    for tokens in map(int, options.tokens.split(",")):
        for size in options.sizes.split(","):
            width, inner = map(int, size.split("x"))
            console.print(f"{tokens} tokens, {width} wide, {inner} in the feed-forward")
            report(tokens, width, inner, options, console)


if __name__ == "__main__":
    main()
