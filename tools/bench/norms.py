"""Time of fused norms on one GPU beside what a network runs without them, eager and compiled, in bf16.

    python -m tools.bench.norms tokens=32760,75600 widths=1536,5120 by_token=true

Every form must agree with fp64 first.  What must move is every tensor, read or written once; how fast memory
can be is shown by a copy of the tokens.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from kernels import norms, reference_norms
from kernels.int8_linear import quantise_tokens
from kernels.selftest import error_share
from tools.bench.timing import Run, Tables, Timing, sizes, start

HEAD_DIM = 128
OPS = ("norm_modulate_int8", "norm_modulate", "norm_rotate", "add_gated")


@dataclass
class Options(Timing):
    """The command line."""

    tokens: str = "32760,75600"
    widths: str = "1536,5120"
    by_token: bool = False
    repeats: int = 9
    calls: int = 10


def quantised(x: Tensor, *signals: Tensor) -> tuple[Tensor, Tensor]:
    """norm_modulate_int8 in two ops."""
    return quantise_tokens(reference_norms.norm_modulate(x, *signals))[:2]


def draw(name: str, tokens: int, width: int, is_by_token: bool) -> tuple[Tensor, ...]:
    """An op's inputs, for one sample."""
    x, y = torch.randn(2, 1, tokens, width, device="cuda").bfloat16()
    if name == "norm_rotate":
        angles = torch.randn(tokens, 1, HEAD_DIM // 2, device="cuda")
        return x, torch.randn(width, device="cuda"), angles.cos(), angles.sin()
    shift, scale = torch.randn(2, 1, tokens if is_by_token else 1, width, device="cuda")
    return (x, y, scale) if name == "add_gated" else (x, shift, scale)


def runs(name: str, *inputs: Tensor) -> dict[str, Run]:
    """An op's forms, its twin in PyTorch first, and a copy."""
    twin, fused = getattr(reference_norms, name), getattr(norms, name)
    eager = quantised if name == "norm_modulate_int8" else twin
    truth = norms.values(twin(*(x.double() for x in inputs)))
    outputs = fused(*inputs)
    moved = sum(x.nbytes for x in (*inputs, *([outputs] if isinstance(outputs, Tensor) else outputs)))
    forms = {"eager": eager, "compiled": torch.compile(eager, dynamic=False), "fused": fused}

    def share(got: Tensor | tuple[Tensor, Tensor]) -> float:
        return error_share(norms.values(got), truth, norms.ALLOWED)

    found = {form: Run(partial(op, *inputs), moved=moved, share=share) for form, op in forms.items()}
    x = inputs[0]
    return found | {"copy": Run(partial(torch.empty_like(x).copy_, x), moved=2 * x.nbytes)}


def tables(options: Options) -> Tables:
    """Every op at every size."""
    for (tokens,), (width,), name in product(sizes(options.tokens), sizes(options.widths), OPS):
        inputs = draw(name, tokens, width, options.by_token)
        yield f"{tokens} tokens x {width}, {name}", runs(name, *inputs)


main = partial(start, Options, tables)

if __name__ == "__main__":
    main()
