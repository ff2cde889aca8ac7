"""Time of 8-bit linear layers on one GPU beside PyTorch's in bf16 and its fp8 products, at Wan's shapes.

    python -m tools.bench.int8_linear tokens=32760,75600 shapes=1536x1536,1536x8960 gelu=true sweep=true

Shapes are in x out.  Every form must give the twin's bits first, call after call, whatever runs beside it.
CUDA events around a few calls, in turns, medians.  `layer` quantises its tokens, as a network's does; fp8 is
the product alone, of tokens and channels with a scale each, and so are the forms that a sweep adds.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from kernels import int8_linear_triton as kernels
from kernels import reference_int8
from kernels.int8_linear import ALLOWED, int8_linear, int8_product, quantise_rows
from kernels.int8_linear_triton import Form
from kernels.reference import E4M3_MAX
from kernels.selftest import error_share, poisoned
from tools.bench.timing import BANDWIDTH, gpu_console, measure, repeated
from tools.options import parse
from turbodiffusion.errors import UserError

BF16 = torch.bfloat16
OTHERS = [
    kernels.SPECIALISED,
    Form(128, 128, 128, 4, 4, tma=True, specialised=True),
    Form(128, 128, 128, 8, 4, tma=True),
    Form(128, 256, 64, 8, 4, tma=True),
    kernels.HOPPER,
    kernels.PORTABLE,
    Form(128, 256, 64, 8, 4),
    Form(128, 128, 128, 8, 3),
]


@dataclass
class Options:
    """The command line."""

    tokens: str = "32760,75600"
    shapes: str = "1536x1536,1536x8960,8960x1536,5120x5120,5120x13824,13824x5120"
    gelu: bool = False
    sweep: bool = False
    repeats: int = 7
    calls: int = 5
    trials: int = 20


class Bench:
    """A layer in bf16, its quantised weight, and tokens."""

    def __init__(self, tokens: int, inputs: int, outputs: int, gelu: bool):
        self.gelu = gelu
        self.x, self.weight, self.bias = (
            torch.randn(size, device="cuda", dtype=BF16)
            for size in ((tokens, inputs), (outputs, inputs), (outputs,))
        )
        self.eight = quantise_rows(self.weight)
        self.rows = quantise_rows(self.x)
        self.truth = reference_int8.product(
            *reference_int8.quantise_rows(self.x), *self.eight, self.bias, gelu=gelu
        ).to(BF16)

    def bf16(self) -> Tensor:
        """What there was before."""
        y = F.linear(self.x, self.weight, self.bias)
        return F.gelu(y, approximate="tanh") if self.gelu else y

    def layer(self) -> Tensor:
        """What a network runs."""
        return int8_linear(self.x, *self.eight, self.bias, gelu=self.gelu)

    def product(self) -> Tensor:
        """The layer less quantisation."""
        return int8_product(*self.rows, *self.eight, self.bias, dtype=BF16, gelu=self.gelu)

    def form(self, form: Form) -> Tensor:
        """The product in a form of the kernel."""
        return kernels.product(*self.rows, *self.eight, self.bias, dtype=BF16, gelu=self.gelu, form=form)

    def fp8(self) -> Callable[[], Tensor]:
        """PyTorch's product of e4m3 numbers; no GELU."""
        x, weight = (_to_e4m3(t) for t in (self.x, self.weight))
        return partial(
            torch._scaled_mm,
            x[0],
            weight[0].mT,
            scale_a=x[1],
            scale_b=weight[1].mT,
            bias=self.bias,
            out_dtype=BF16,
            use_fast_accum=True,
        )

    def is_right(self, run: Callable[[], Tensor], trials: int) -> bool:
        """Whether every call gives the twin's numbers."""
        for _ in range(trials):
            with poisoned():
                y = run()
            # of a GELU a last bit may differ; anything more is wrong, and so is NaN
            same = error_share((y,), (self.truth,), ALLOWED) <= 1 if self.gelu else torch.equal(y, self.truth)
            if not same:
                return False
        return True


def _to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(1, keepdim=True) / E4M3_MAX
    return (x / scale).to(torch.float8_e4m3fn), scale


def sound_forms(bench: Bench, trials: int, console: Console) -> dict[str, Callable[[], Tensor]]:
    """Those that run and are right; says which do not and are not."""
    runs = {}
    for form in OTHERS:
        name, run = f"form {tuple(form)}", partial(bench.form, form)
        try:
            if bench.is_right(run, trials):
                runs[name] = run
            else:
                console.print(f"  {name}: WRONG, not timed")
        except Exception as error:  # compiler, driver and launcher each raise their own
            console.print(f"  {name}: does not run: {str(error).splitlines()[0][:120]}")
    return runs


def report(bench: Bench, options: Options, console: Console) -> None:
    """Check, time in turns and print; the first run is the yardstick."""
    runs = {"bf16": bench.bf16, "layer": bench.layer, "product": bench.product}
    if wrong := [name for name in ("layer", "product") if not bench.is_right(runs[name], options.trials)]:
        raise UserError(f"wrong, so not timed: {', '.join(wrong)}")
    runs["quantisation"] = partial(quantise_rows, bench.x)
    if torch.cuda.get_device_capability() >= (8, 9):
        runs["fp8 product"] = bench.fp8()
    if options.sweep:
        runs |= sound_forms(bench, options.trials, console)
    calls = {name: partial(repeated, run, options.calls) for name, run in runs.items()}
    (M, K), N = bench.x.shape, bench.weight.shape[0]
    yardstick = None
    for name, spent in measure(calls, options.repeats).items():
        times = [ms / options.calls for ms in spent]
        ms = statistics.median(times)
        yardstick = yardstick or ms
        said = f"{2 * M * K * N / ms / 1e9:.0f} TOP/s, {yardstick / ms:.2f} x bf16"
        if name == "quantisation":
            said = f"floor {1e3 * 3 * M * K / BANDWIDTH:.3f} ms"
        console.print(f"  {name}: {ms:.3f} ms ({min(times):.3f} to {max(times):.3f}), {said}")


@torch.no_grad()
def main() -> None:
    """Gate, time, print."""
    options = parse(Options, sys.argv[1:])
    console = gpu_console(f"GELU {options.gelu}")
    for tokens in map(int, options.tokens.split(",")):
        for shape in options.shapes.split(","):
            inputs, outputs = map(int, shape.split("x"))
            console.print(f"{tokens} tokens, {inputs} -> {outputs}")
            report(Bench(tokens, inputs, outputs, options.gelu), options, console)


if __name__ == "__main__":
    main()
