"""Time of 8-bit linear layers on one GPU beside PyTorch's in bf16 and its fp8 products, at Wan's shapes.

    python -m tools.bench.int8_linear tokens=32760,75600 shapes=1536x1536,1536x8960 gelu=true sweep=true

Shapes are in x out.  Every form must give the twin's bits first, call after call, whatever runs beside it.
CUDA events around a few calls, in turns, medians.  `layer` quantises its tokens, as a network's does; fp8 is
the product alone, of tokens and channels with a scale each, and so are the forms that a sweep adds; int_mm is
PyTorch's product, whose int32 take steps, bias and rounding in a pass of their own, compiled.  Floors are of
an H200: 1,580 TOP/s in 8 bits, and what must move at 4.3 TB/s.  tools/bench/int8_block.py has the rest.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from kernels import int8_linear_triton as kernels
from kernels import reference_int8
from kernels.int8_linear import ALLOWED, int8_linear, int8_product, quantise_rows, quantise_tokens
from kernels.int8_linear_triton import Finish, Form
from kernels.reference import E4M3_MAX
from kernels.selftest import error_share, poisoned
from kernels.tiles import HAS_GLUON
from tools.bench.timing import BANDWIDTH, gpu_console, measure, repeated
from tools.options import parse
from turbodiffusion.errors import UserError

BF16 = torch.bfloat16
PACE = 1.58e15  # products and sums a second of an H200 in 8 bits
# what the original's layer takes of 32,760 tokens on an H200, ms
ORIGINAL = {
    (1536, 1536): 0.569,
    (1536, 8960): 2.85,
    (8960, 1536): 2.16,
    (5120, 5120): 3.82,
    (5120, 13824): 9.68,
    (13824, 5120): 8.82,
}
OTHERS = [
    kernels.HOPPER,
    Form(128, 256, 128, 8, 3, tma=True),
    Form(128, 128, 128, 8, 4, tma=True),
    kernels.PORTABLE,
    Form(128, 256, 64, 8, 4),
    Form(128, 128, 128, 8, 3),
]
# columns, stages and rows of tiles together, of the form for Hopper
GLUON = [(256, 4, 8), (256, 4, 16), (256, 3, 8), (128, 6, 8), (128, 6, 16)]


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
        self.rows = quantise_tokens(self.x)
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
        return int8_product(self.rows, *self.eight, self.bias, gelu=self.gelu)[0]

    def form(self, form: NamedTuple) -> Tensor:
        """The product in a form of the kernel."""
        tensors, finish = (*self.rows[:2], *self.eight, self.bias), Finish(self.gelu)
        return kernels.product(*tensors, dtype=BF16, finish=finish, form=form)[0]

    def int_mm(self) -> Tensor:
        """PyTorch's product of int8 numbers, and a pass over its sums."""
        sums = torch._int_mm(self.rows.counts, self.eight[0].mT)
        return _finished(sums, self.rows.steps, self.eight[1], self.bias, self.gelu)

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


@torch.compile
def _finished(sums: Tensor, x_step: Tensor, weight_step: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    y = sums * x_step.unsqueeze(1) * weight_step + bias
    return (F.gelu(y, approximate="tanh") if gelu else y).to(BF16)


def _to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(1, keepdim=True) / E4M3_MAX
    return (x / scale).to(torch.float8_e4m3fn), scale


def sound_forms(bench: Bench, trials: int, console: Console) -> dict[str, Callable[[], Tensor]]:
    """Those that run and are right; says which do not and are not."""
    forms, runs = OTHERS, {}
    if HAS_GLUON:
        from kernels import int8_linear_hopper

        forms = [*(int8_linear_hopper.Form(128, *sizes) for sizes in GLUON), *OTHERS]
    for form in forms:
        name, run = str(form), partial(bench.form, form)
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
    runs |= {"quantisation": partial(quantise_rows, bench.x), "int_mm": bench.int_mm}
    if torch.cuda.get_device_capability() >= (8, 9):
        runs["fp8"] = bench.fp8()
    if options.sweep:
        runs |= sound_forms(bench, options.trials, console)
    calls = {name: partial(repeated, run, options.calls) for name, run in runs.items()}
    (M, K), N = bench.x.shape, bench.weight.shape[0]
    medians = {}
    for name, spent in measure(calls, options.repeats).items():
        times = [ms / options.calls for ms in spent]
        medians[name] = ms = statistics.median(times)
        said = f"{2 * M * K * N / ms / 1e9:.0f} TOP/s, {medians['bf16'] / ms:.2f} x bf16"
        if name == "quantisation":
            said = f"floor {1e3 * 3 * M * K / BANDWIDTH:.3f} ms"
        console.print(f"  {name}: {ms:.3f} ms ({min(times):.3f} to {max(times):.3f}), {said}")
    for line in targets(bench, medians):
        console.print(f"  {line}")


def targets(bench: Bench, ms: dict[str, float]) -> list[str]:
    """What was wanted of a layer, what it reached, and what the hardware would allow it."""
    (M, K), N = bench.x.shape, bench.weight.shape[0]
    product = 1e3 * 2 * M * K * N / PACE
    layer = product + 1e3 * 3 * M * K / BANDWIDTH
    lines = [
        _target("layer, x bf16", 1.35 if K == 1536 else 1.6, ms["bf16"], ms["layer"], layer),
        _target("product, x int_mm and a pass", 1.4, ms["int_mm"], ms["product"], product),
    ]
    if "fp8" in ms:
        lines.append(_target("product, x fp8", 1.0, ms["fp8"], ms["product"], product))
    if M == 32760 and (K, N) in ORIGINAL and not bench.gelu:
        wanted, original = (3.0 if K == N == 1536 else 2.5), ORIGINAL[K, N]
        lines.append(_target("layer, x the original's on an H200", wanted, original, ms["layer"], layer))
    return lines


def _target(name: str, wanted: float, other: float, ours: float, floor: float) -> str:
    return (
        f"{name}: target {wanted:.2f}, reached {other / ours:.2f}, floor {floor:.3f} ms = {other / floor:.2f}"
    )


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
