"""Time of what a block computes around its 8-bit linear layers on one GPU, beside the same in other numbers.

    python -m tools.bench.int8_block tokens=32760,75600 shapes=1536x8960,5120x13824

Shapes are width x feed-forward width.  A network's own functions run, once with layers in bf16, which others
must be near, and in int8 and fp8; `compiled` is torch.compile of all of a part, for which fp8 tokens are
quantised op by op.  Floors are of int8, and of every tensor between kernels written and read.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from kernels import fp8_linear
from kernels.reference import E4M3_MAX
from tools.bench.timing import INT8_RATE, Run, Tables, Timing, share_of, sizes, start
from turbodiffusion.models.int8 import EightBitLinear, Fp8Linear, Int8Linear
from turbodiffusion.models.projections import add_projected, modulated, projected

# of Gaussian numbers int8 loses 1.3e-2 of a product and e4m3 3.8e-2, here of a branch as large as what it is
# added to, or two in a row; anything wrong is off by more
ALLOWED = 0.06
TARGETS = {"ffn": {"fp8": 1.5, "fp8 compiled": 1.2}}


@dataclass
class Options(Timing):
    """The command line."""

    tokens: str = "32760,75600"
    shapes: str = "1536x8960,5120x13824"
    repeats: int = 7


class OpenFp8Linear(Fp8Linear):
    """One that torch.compile sees through."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).float()
        step = rows.abs().amax(-1) / E4M3_MAX
        tokens = (rows / step.unsqueeze(-1)).to(self.weight.dtype), step
        return fp8_linear.library(*tokens, self.weight, self.scale, self.bias).view(*x.shape[:-1], -1)


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

    def out(self, x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """o and its gated sum."""
        return add_projected(x, y, self.o, gate)

    def ffn(self, x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Norm, modulation, feed-forward and its gated sum."""
        h = self.gelu(self.up(modulated(x, shift, scale, self.up)))
        return add_projected(x, h, self.down, gate)

    def in_numbers(self, kind: type[EightBitLinear]) -> "Layers":
        """The same with layers in 8 bits."""
        other = deepcopy(self)
        for name in ("q", "k", "v", "o", "up", "down"):
            setattr(other, name, kind.from_linear(getattr(self, name)))
        if kind is not OpenFp8Linear:
            other.up.gelu, other.gelu = True, nn.Identity()
        return other


# of each: products a token, and bytes between kernels, both in the width E and the inner width I.  x to int8
# and back, three outputs; y to int8 and back, x, the sum; both, and bf16 to int8 and back
WORK: dict[str, tuple[Callable[[int, int], int], Callable[[int, int], int]]] = {
    "qkv": (lambda E, I: 3 * E * E, lambda E, I: (2 + 1 + 1 + 6) * E),
    "out": (lambda E, I: E * E, lambda E, I: (2 + 1 + 1 + 2 + 2) * E),
    "ffn": (lambda E, I: 2 * E * I, lambda E, I: (2 + 1 + 1 + 2 + 2) * E + (2 + 2 + 1 + 1) * I),
}


def runs(part: str, kinds: dict[str, Layers], inputs: list[Tensor], inner: int) -> dict[str, Run]:
    """A part of a block with each kind of layers."""
    (_, tokens, width), (products, moved) = inputs[0].shape, WORK[part]
    calls = {kind: getattr(layers, part) for kind, layers in kinds.items()}
    truth = calls["bf16"](*inputs)
    share = share_of((truth,) if isinstance(truth, Tensor) else truth, ALLOWED)
    least = {"work": 2 * tokens * products(width, inner), "moved": tokens * moved(width, inner)}
    found = {}
    for kind, call in calls.items():
        form = torch.compile(call, dynamic=False) if kind.endswith("compiled") else call
        targets = TARGETS.get(part, {}) if kind == "int8" else {}
        found[kind] = Run(partial(form, *inputs), **least, rate=INT8_RATE, share=share, targets=targets)
    return found


def tables(options: Options) -> Tables:
    """Every part of every block with every number of tokens."""
    for (tokens,), (width, inner) in product(sizes(options.tokens), sizes(options.shapes)):
        with torch.device("cuda"):
            floats = Layers(width, inner).bfloat16()
            inputs = [torch.randn(1, tokens, width, dtype=torch.bfloat16) for _ in range(2)]
            inputs += [torch.randn(1, 1, width) for _ in range(3)]
        kinds = {"bf16": floats, "int8": floats.in_numbers(Int8Linear), "bf16 compiled": floats}
        if torch.cuda.get_device_capability() >= (8, 9):
            kinds["fp8"] = floats.in_numbers(Fp8Linear)
            kinds["fp8 compiled"] = floats.in_numbers(OpenFp8Linear)
        for part in WORK:
            title = f"{tokens} tokens, {width} wide, {inner} in the feed-forward: {part}"
            yield title, runs(part, kinds, inputs, inner)


main = partial(start, Options, tables)

if __name__ == "__main__":
    main()
