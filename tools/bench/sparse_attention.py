"""Time of block-sparse attention on one GPU, every form of its kernels beside PyTorch's dense attention.

    python -m tools.bench.sparse_attention heads=12,40 length=32760,75600 ratio=0.1,0.05

Every form must agree with fp64 on slices of its own output first.  CUDA events, the forms in turns, medians.
FLOP are those of the selected blocks: 4 for a row, key and channel forward, 12 with a tangent, 14 forward and
backward; `share` is of the 790 TFLOP/s, or 1,580 in 8 bits, that matrix products reach on an H200; `x dense`
is over cuDNN's attention of all keys.  Derivatives are timed for the first number of heads alone.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels import block_sparse_int8_triton as int8
from kernels import block_sparse_triton as sparse
from kernels import reference
from kernels.block_sparse import sparse_attention
from kernels.block_sparse_triton import Blocks, Form
from kernels.selftest import poisoned
from tools.bench.flash_jvp import CEILING, measure
from tools.options import parse
from turbodiffusion.errors import UserError

# beside those that are shipped
OTHERS = {
    "forward": [
        Form(128, 64, 4, 2, tma=True, specialise=True),
        Form(64, 64, 4, 2, tma=True, registers=128),
        Form(64, 64, 4, 3, tma=True),
        Form(128, 64, 8, 3, tma=True),
        Form(128, 64, 8, 2),
    ],
    "tangent": [Form(64, 64, 4, 2, tma=True), Form(64, 64, 8, 2, tma=True), Form(64, 32, 4, 2, tma=True)],
    "queries": [
        Form(64, 64, 4, 1, tma=True),
        Form(64, 64, 4, 3, tma=True),
        Form(128, 64, 8, 2, tma=True),
    ],
    "keys": [Form(64, 64, 8, 2, tma=True), Form(32, 64, 4, 2, tma=True), Form(64, 64, 4, 1, tma=True)],
}
EIGHT = [
    int8.Eight(Form(64, 64, 4, 1, tma=True, registers=128), True),
    int8.Eight(Form(64, 64, 4, 3, tma=True, registers=128), True),
    int8.Eight(Form(128, 64, 4, 2, tma=True, specialise=True), True),
    int8.Eight(Form(64, 128, 4, 2, tma=True), True),
    int8.Eight(Form(64, 64, 4, 2, tma=True, registers=128), False),
]
# products of e4m3 and of int8 numbers lose about 0.04 and 0.013 on normal data; bf16 rounds at 0.002
LIMITS = {"bf16": 5e-3, "int8": 3e-2, "e4m3": 8e-2}


@dataclass
class Options:
    """The command line."""

    heads: str = "12,40"
    length: str = "32760,75600"
    ratio: str = "0.1,0.05"
    lists: str = "random,local"
    width: int = 128
    block_q: int = 128
    block_k: int = 64
    repeats: int = 5


@dataclass
class Run:
    """One thing to time: what it calls, its FLOP for a row, key and channel, and how exact it is."""

    call: Callable[[], object]
    flop: int
    numbers: str = "bf16"
    is_dense: bool = False


class Bench:
    """q, k, v, g and their tangents (1, N, L, D) in bf16, and one list."""

    def __init__(self, options: Options, heads: int, length: int, ratio: float, kind: str, console: Console):
        size = (1, length, heads, options.width)
        self.q, self.k, self.v, self.g, *self.tangents = (
            torch.randn(size, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(7)
        )
        queries, keys = (-(-length // block) for block in (options.block_q, options.block_k))
        kept = reference.kept_blocks(ratio, keys)
        self.blocks = Blocks(choose(kind, heads, queries, keys, kept), options.block_q, options.block_k)
        self.name = f"{heads} heads x {length}, {kept} of {keys} blocks, {kind}"
        self.work = heads * length * options.width
        self.keys = {False: kept * options.block_k, True: length}
        self.console = console

    def forms(self, kind: str) -> list[Form]:
        """The shipped ones, and others that fit the blocks."""
        major, minor = torch.cuda.get_device_capability()
        sizes = (self.blocks.q, self.blocks.k)
        shipped = sparse.forms_for(kind, torch.bfloat16, 10 * major + minor, *sizes)
        others = [x for x in OTHERS[kind] if x.rows <= sizes[0] and x.keys <= sizes[1]]
        return list(dict.fromkeys([*shipped, *others]))

    def forward(self) -> dict[str, Run]:
        """Runs of the output alone, those that are right."""
        primals = (self.q, self.k, self.v)
        runs = {"cuDNN, dense": Run(partial(dense, *primals), 4, is_dense=True)}
        for form in self.forms("forward"):
            call = partial(sparse.attention, *primals, self.blocks, form)
            if self.passed(f"bf16 {label(form)}", call, lambda out: self.error(out[0]), LIMITS["bf16"]):
                runs[f"bf16 {label(form)}"] = Run(call, 4)
        major, minor = torch.cuda.get_device_capability()
        eights = int8.forms_for(10 * major + minor) + [
            x for x in EIGHT if x.form.rows <= self.blocks.q and x.form.keys <= self.blocks.k
        ]
        for eight in dict.fromkeys(eights):
            numbers = "e4m3" if eight.fp8 else "int8"
            quantised = int8.quantise(*primals, self.blocks, eight.fp8)
            call = partial(int8.attend, quantised, self.blocks, eight.form, torch.bfloat16)
            if self.passed(f"{numbers} {label(eight.form)}", call, self.error, LIMITS[numbers]):
                runs[f"{numbers} {label(eight.form)}"] = Run(call, 4, numbers)
        for fp8 in {eight.fp8 for eight in eights}:
            call = partial(int8.quantise, *primals, self.blocks, fp8)
            runs[f"quantising, {'e4m3' if fp8 else 'bf16'} values"] = Run(call, 0)
        return runs

    def derivatives(self) -> dict[str, Run]:
        """Runs of tangents, and of forward and backward, those that are right."""
        primals, tangents = (self.q, self.k, self.v), tuple(self.tangents)
        leaves = [x.detach().requires_grad_() for x in primals]
        attend = partial(
            sparse_attention, block_index=self.blocks.index, block_q=self.blocks.q, block_k=self.blocks.k
        )

        def both(attend: Callable[..., Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(attend(*leaves), leaves, self.g)

        transpose = partial(sparse.transposed, self.blocks.index, -(-self.k.shape[2] // self.blocks.k))
        runs = {
            "cuDNN, dense, forward + backward": Run(partial(both, dense), 14, is_dense=True),
            "forward + backward": Run(partial(both, attend), 14),
            "transposed list": Run(transpose, 0),
        }
        truth, grads = self.truth()
        for form in self.forms("tangent"):
            call = partial(sparse.tangent, primals, tangents, self.blocks, form)
            if self.passed(
                f"tangent {label(form)}", call, lambda out: off(out[2][:, :1], truth), LIMITS["bf16"]
            ):
                runs[f"tangent {label(form)}"] = Run(call, 12)
        saved = (*primals, *sparse.attention(*primals, self.blocks, self.forms("forward")[0]))
        pairs = {"queries": self.forms("queries"), "keys": self.forms("keys")}
        for kind, form in ((kind, form) for kind, forms in pairs.items() for form in forms):
            chosen = [form if name == kind else pairs[name][0] for name in pairs]
            call = partial(sparse.backward, saved, self.g, self.blocks, *chosen)
            name = f"backward, {kind} {label(form)}"
            if self.passed(
                name,
                call,
                lambda out: max(off(x[:, :1], y) for x, y in zip(out, grads, strict=True)),
                LIMITS["bf16"],
            ):
                runs[name] = Run(call, 10)
        return runs

    def passed(
        self, name: str, call: Callable[[], object], error: Callable[[object], float], limit: float
    ) -> bool:
        """Whether a form runs and agrees with fp64; says so, and why not."""
        start = time.perf_counter()
        try:
            with poisoned():
                out = call()
            torch.cuda.synchronize()
        except (sparse.triton.TritonError, RuntimeError) as reason:
            self.console.print(f"{name}: does not run: {str(reason).splitlines()[0][:150]}")
            return False
        first, found = time.perf_counter() - start, error(out)
        verdict = "" if found < limit else ": WRONG, not timed"
        self.console.print(f"{name}: first use {first:.1f} s, error {found:.1e}{verdict}")
        return not verdict

    def error(self, o: Tensor) -> float:
        """Largest error of o relative to fp64: the first and last query block of the first and last head."""
        worst, size = 0.0, self.blocks.q
        for head, block in product((0, -1), (0, self.blocks.index.shape[2] - 1)):
            heads, rows = slice(head, None if head else 1), slice(block * size, (block + 1) * size)
            q, k, v = (x[:, heads].double() for x in (self.q[:, :, rows], self.k, self.v))
            index = self.blocks.index[:, heads, block : block + 1]
            truth, _ = reference.sparse_attention(q, k, v, index, block_q=size, block_k=self.blocks.k)
            worst = max(worst, off(o[:, heads, rows], truth))
        return worst

    def truth(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The tangent, and the gradients, of the first head in fp64."""
        q, k, v, g, *tangents = (x[:, :1].double() for x in (self.q, self.k, self.v, self.g, *self.tangents))
        index = self.blocks.index[:, :1]

        def twin(*primals: Tensor) -> Tensor:
            sizes = {"block_q": self.blocks.q, "block_k": self.blocks.k}
            return reference.sparse_attention(*primals, index, **sizes)[0]

        with torch.no_grad():
            tangent = torch.func.jvp(twin, (q, k, v), tuple(tangents))[1]
        leaves = [x.requires_grad_() for x in (q, k, v)]
        return tangent, torch.autograd.grad(twin(*leaves), leaves, g)

    def report(self, runs: dict[str, Run], repeats: int) -> None:
        """Time the runs in turns and print them; the first is the dense one."""
        times = measure({name: run.call for name, run in runs.items()}, repeats)
        medians = {name: statistics.median(values) for name, values in times.items()}
        yardstick = next(iter(medians.values()))
        for name, run in runs.items():
            ms, spread = medians[name], f"{min(times[name]):.2f} to {max(times[name]):.2f}"
            rate = run.flop * self.work * self.keys[run.is_dense] / ms * 1e3
            share = rate / (CEILING if run.numbers == "bf16" else 2 * CEILING)
            self.console.print(
                f"{self.name}, {name}: {ms:.3f} ms ({spread}), {rate / 1e12:.0f} TFLOP/s, share {share:.2f}, "
                f"{yardstick / ms:.1f} x dense"
            )


def off(got: Tensor, truth: Tensor) -> float:
    """Error relative to the truth; a NaN must not pass for small."""
    return torch.nan_to_num((got.double() - truth).norm() / truth.norm(), nan=torch.inf).item()


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fastest on this kind of GPU."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v)


def choose(kind: str, heads: int, queries: int, keys: int, kept: int) -> Tensor:
    """Lists (1, N, queries, kept): of random blocks, or of those around the same share of the sequence."""
    if kind == "local":
        first = torch.arange(queries, device="cuda") * keys // queries - kept // 2
        index = first.clamp(0, keys - kept)[:, None] + torch.arange(kept, device="cuda")
        return index.int().expand(1, heads, -1, -1).contiguous()
    scores = torch.rand(1, heads, queries, keys, device="cuda")
    return scores.topk(kept).indices.sort(-1).values.int()


def label(form: Form) -> str:
    """128x64 8w 2st and what else it has."""
    extra = {"TMA": form.tma, "specialised": form.specialise, f"maxnreg {form.registers}": form.registers}
    words = [name for name, given in extra.items() if given]
    return " ".join([f"{form.rows}x{form.keys} {form.warps}w {form.stages}st", *words])


def listed(text: str, kind: type) -> list[int | float]:
    """What is written between the commas."""
    return [kind(word) for word in text.split(",")]


def main() -> None:
    """Gate, time, print."""
    options = parse(Options, sys.argv[1:])
    if not torch.cuda.is_available():
        raise UserError("this times a GPU and there is none here; the tests in tests/kernels run without")
    console = Console(width=160)
    blocks = f"blocks of {options.block_q} queries and {options.block_k} keys"
    console.print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, width {options.width}, {blocks}"
    )
    heads = listed(options.heads, int)
    shapes = product(heads, listed(options.length, int), listed(options.ratio, float))
    for (count, length, ratio), kind in product(shapes, options.lists.split(",")):
        bench = Bench(options, count, length, ratio, kind, console)
        with torch.no_grad():
            bench.report(bench.forward(), options.repeats)
        if count == heads[0]:
            bench.report(bench.derivatives(), options.repeats)


if __name__ == "__main__":
    main()
