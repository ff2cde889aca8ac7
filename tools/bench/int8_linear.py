"""Time of 8-bit linear layers on one GPU beside PyTorch's in bf16 and its fp8 products, at Wan's shapes.

    python -m tools.bench.int8_linear tokens=32760,75600 shapes=1536x1536,1536x8960 gelu=true

Shapes are in x out.  What is ours must give the twin's numbers first, call after call, whatever runs beside
it.  `layer` quantises its tokens, as a network's does; `product` does not, nor do fp8, the forms the kernel
has here, and int_mm, PyTorch's product, whose int32 take steps, bias and rounding in a pass of their own,
compiled.  tools/bench/int8_block.py has what is around a layer.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import fp8_linear, reference_int8
from kernels import int8_linear_triton as kernels
from kernels.int8_linear import ALLOWED, int8_linear, int8_product, quantise_rows, quantise_tokens
from tools.bench.timing import INT8_RATE, Run, Tables, Timing, share_of, sizes, start

BF16 = torch.bfloat16


@dataclass
class Options(Timing):
    """The command line."""

    tokens: str = "32760,75600"
    shapes: str = "1536x1536,1536x8960,8960x1536,5120x5120,5120x13824,13824x5120"
    gelu: bool = False
    repeats: int = 7
    trials: int = 20


@torch.compile
def _finished(sums: Tensor, x_step: Tensor, weight_step: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    y = sums * x_step.unsqueeze(1) * weight_step + bias
    return (F.gelu(y, approximate="tanh") if gelu else y).to(BF16)


def runs(tokens: int, inputs: int, outputs: int, gelu: bool) -> dict[str, Run]:
    """A layer in bf16, the same in 8 bits, and its parts."""
    drawn = (tokens, inputs), (outputs, inputs), (outputs,)
    x, weight, bias = (torch.randn(size, device="cuda", dtype=BF16) for size in drawn)
    eight, rows = quantise_rows(weight), quantise_tokens(x)
    truth = reference_int8.product(*reference_int8.quantise_rows(x), *eight, bias, gelu=gelu).to(BF16)
    # x is read in bf16 and written in int8
    work, moved, share = 2 * x.numel() * outputs, 3 * x.numel(), share_of((truth,), ALLOWED)
    layer, multiply = (partial(call, gelu=gelu) for call in (int8_linear, int8_product))

    def bf16() -> Tensor:
        y = F.linear(x, weight, bias)
        return F.gelu(y, approximate="tanh") if gelu else y

    def int_mm() -> Tensor:
        return _finished(torch._int_mm(rows.counts, eight[0].mT), rows.steps, eight[1], bias, gelu)

    run = partial(Run, work=work, rate=INT8_RATE)
    ours = partial(run, share=share)
    wanted = {"bf16": 1.35 if inputs == 1536 else 1.6}
    found = {
        "bf16": Run(bf16, work),
        "layer": ours(partial(layer, x, *eight, bias), moved=moved, targets=wanted),
        "product": ours(partial(multiply, rows, *eight, bias), targets={"int_mm": 1.4, "fp8": 1.0}),
        "quantisation": Run(partial(quantise_rows, x), moved=moved),
        "int_mm": run(int_mm),
    }
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) >= (8, 9):
        fp8 = (*fp8_linear.quantise_rows(x), *fp8_linear.quantise_rows(weight), bias)
        found["fp8"] = run(partial(fp8_linear.library, *fp8))
    for form in kernels.forms_for(10 * major + minor, aligned=True):
        named = {"dtype": BF16, "finish": kernels.Finish(gelu), "form": form}
        found[f"  {form}"] = ours(partial(kernels.product, *rows[:2], *eight, bias, **named))
    return found


def tables(options: Options) -> Tables:
    """Every shape with every number of tokens."""
    for (tokens,), (inputs, outputs) in product(sizes(options.tokens), sizes(options.shapes)):
        yield f"{tokens} tokens, {inputs} -> {outputs}", runs(tokens, inputs, outputs, options.gelu)


main = partial(start, Options, tables)

if __name__ == "__main__":
    main()
