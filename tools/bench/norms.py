"""Time of fused norms on one GPU beside what a network runs without them, eager and compiled, in bf16.

    python -m tools.bench.norms tokens=32760,75600 widths=1536,5120 by_token=true

Every form must agree with fp64 first.  CUDA events around a few calls, in turns, medians.  Rates are of the
bytes that must move, tensors read and written once; the floor is theirs at the 4.3 TB/s an H200 reaches.
"""

import statistics
import sys
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from torch import Tensor

from kernels import norms, reference_norms
from kernels.int8_linear import quantise_tokens
from kernels.selftest import error_share, poisoned
from tools.bench.timing import BANDWIDTH, gpu_console, measure, repeated
from tools.options import parse
from turbodiffusion.errors import UserError

HEAD_DIM = 128


@dataclass
class Options:
    """The command line."""

    tokens: str = "32760,75600"
    widths: str = "1536,5120"
    by_token: bool = False
    repeats: int = 9
    calls: int = 10


def quantised(x: Tensor, *signals: Tensor) -> tuple[Tensor, Tensor]:
    """norm_modulate_int8 in two ops."""
    tokens = quantise_tokens(reference_norms.norm_modulate(x, *signals))
    return tokens.counts, tokens.steps


# ops by name, and what a network runs without them: the twins
EAGER = {"norm_modulate_int8": quantised} | {
    name: getattr(reference_norms, name) for name in ("norm_modulate", "norm_rotate", "add_gated")
}


def draw(name: str, tokens: int, width: int, is_by_token: bool) -> tuple[Tensor, ...]:
    """An op's inputs, for one sample."""
    x, y = torch.randn(2, 1, tokens, width, device="cuda").bfloat16()
    if name == "norm_rotate":
        angles = torch.randn(tokens, 1, HEAD_DIM // 2, device="cuda")
        return x, torch.randn(width, device="cuda"), angles.cos(), angles.sin()
    shift, scale = torch.randn(2, 1, tokens if is_by_token else 1, width, device="cuda")
    return (x, y, scale) if name == "add_gated" else (x, shift, scale)


def report(name: str, inputs: tuple[Tensor, ...], options: Options, console: Console) -> None:
    """Check, time in turns and print; eager is the yardstick, and a copy of the tokens the pace of memory."""
    forms = {"eager": EAGER[name], "compiled": torch.compile(EAGER[name], dynamic=False)}
    forms["fused"] = getattr(norms, name)
    runs = {label: partial(form, *inputs) for label, form in forms.items()}
    truth = norms.values(getattr(reference_norms, name)(*(x.double() for x in inputs)))
    for label, run in runs.items():
        with poisoned():
            outputs = run()
        if not error_share(norms.values(outputs), truth, norms.ALLOWED) <= 1:
            raise UserError(f"{name}, {label}: wrong, so not timed")
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    moved = dict.fromkeys(runs, sum(x.nbytes for x in (*inputs, *outputs)))
    runs["copy"], moved["copy"] = partial(torch.empty_like(inputs[0]).copy_, inputs[0]), 2 * inputs[0].nbytes
    console.print(f" {name}: floor {1e3 * moved['fused'] / BANDWIDTH:.3f} ms")
    calls = {label: partial(repeated, run, options.calls) for label, run in runs.items()}
    yardstick = None
    for label, spent in measure(calls, options.repeats).items():
        low, ms, high = (pick(spent) / options.calls for pick in (min, statistics.median, max))
        yardstick = yardstick or ms
        rate = f"{moved[label] / ms / 1e9:.2f} TB/s, {yardstick / ms:.2f} x eager"
        console.print(f"  {label}: {ms:.3f} ms ({low:.3f} to {high:.3f}), {rate}")


@torch.no_grad()
def main() -> None:
    """Gate, time, print."""
    options = parse(Options, sys.argv[1:])
    console = gpu_console(f"by token {options.by_token}")
    for tokens in map(int, options.tokens.split(",")):
        for width in map(int, options.widths.split(",")):
            console.print(f"{tokens} tokens x {width}")
            for name in EAGER:
                report(name, draw(name, tokens, width, options.by_token), options, console)


if __name__ == "__main__":
    main()
