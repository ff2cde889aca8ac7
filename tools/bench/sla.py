"""Time of sparse-linear attention on one GPU, whole and in parts, beside PyTorch's dense attention, in bf16.

    python -m tools.bench.sla heads=12,40 tokens=32760,75600 ratio=0.1,0.05

The operator must agree with fp64 first.  CUDA events around a few calls, in turns, medians.  FLOP are those
of the selected blocks: 4 for a row, key and channel forward, 12 with a tangent, 14 forward and backward.  The
floor of what waits for memory is its tensors, read and written once, at the 4.3 TB/s that an H200 reaches.
Derivatives, beside dense attention with its gradients, are timed for the first number of heads alone.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels import reference
from kernels.block_map import block_map
from kernels.block_sparse import sparse_attention
from kernels.block_sparse_int8 import ALLOWED, sparse_attention_int8
from kernels.block_sparse_linear import sparse_linear_attention
from kernels.linear_attention import linear_attention, plain
from kernels.selftest import error_share, poisoned
from tools.bench.timing import BANDWIDTH, gpu_console, measure, repeated
from tools.options import parse
from turbodiffusion.attention import SparseLinearAttention
from turbodiffusion.errors import UserError

# bf16 rounds at 2e-3 of a number's size, a few times on the way
LIMITS = {"bf16": 1e-2, "8 bits": ALLOWED["e4m3"], "gradients": 1e-2, "tangent": 1e-2}


@dataclass
class Options:
    """The command line."""

    heads: str = "12,40"
    tokens: str = "32760,75600"
    ratio: str = "0.1,0.05"
    width: int = 128
    block_q: int = 64
    block_k: int = 64
    repeats: int = 5
    calls: int = 5


@dataclass
class Run:
    """What to time; its FLOP for a row, key and channel, or the tensors like q that it reads and writes."""

    call: Callable[[], object]
    flop: int = 0
    tensors: int = 0
    is_dense: bool = False


class Bench:
    """The operator and its inputs (1, N, L, D), tokens first in memory, with tangents and a gradient."""

    def __init__(self, options: Options, heads: int, tokens: int, ratio: float):
        size = (1, tokens, heads, options.width)
        drawn = (torch.randn(size, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(7))
        self.q, self.k, self.v, self.grad, *self.tangents = drawn
        self.primals = (self.q, self.k, self.v)
        self.blocks = {"block_q": options.block_q, "block_k": options.block_k}
        self.operators = {}
        for name in ("bf16", "8 bits"):
            core = SparseLinearAttention(options.width, ratio=ratio, **self.blocks, int8=name == "8 bits")
            self.operators[name] = core.requires_grad_(False).to("cuda", torch.bfloat16)
        self.proj = self.operators["bf16"].proj_l
        nn.init.normal_(self.proj["weight"], std=options.width**-0.5)
        self.operators["8 bits"].load_state_dict(self.operators["bf16"].state_dict())
        self.map = partial(block_map, self.q, self.k, **self.blocks, ratio=ratio)
        self.index = self.map()
        self.kept = self.index.shape[-1] * options.block_k

    def forward(self) -> dict[str, Run]:
        """Runs of outputs alone."""
        listed = {"block_index": self.index, **self.blocks}
        return {
            "dense, cuDNN": Run(partial(dense, *self.primals), 4, is_dense=True),
            "operator, bf16": Run(partial(self.operators["bf16"], *self.primals), 4),
            "operator, 8 bits": Run(partial(self.operators["8 bits"], *self.primals), 4),
            "block map": Run(self.map, tensors=2),
            "sparse, bf16": Run(partial(sparse_attention, *self.primals, **listed), 4),
            "sparse, 8 bits": Run(partial(sparse_attention_int8, *self.primals, **listed), 4),
            "linear branch": Run(partial(self.linear, *self.primals), tensors=5),
            "sparse with linear branch, bf16": Run(partial(self.together, int8=False), 4),
            "sparse with linear branch, 8 bits": Run(partial(self.together, int8=True), 4),
            **self.linear_parts(),
            **self.forms(),
        }

    def linear_parts(self) -> dict[str, Run]:
        """The kernels of the linear branch and its tangent, each by itself."""
        from kernels import linear_attention_tangent_triton as tangent
        from kernels import linear_attention_triton as kernels

        q, k, v, dq, dk, dv = (x.transpose(1, 2) for x in (*self.primals, *self.tangents))
        weight, bias = self.proj["weight"], self.proj["bias"]
        o, do = torch.empty_like(q), torch.empty_like(q)
        keys, queries, dual_keys, dual_queries = (
            kernels.Walk(q, kind, "softmax")
            for kind in ("state", "output", "state_tangent", "output_tangent")
        )
        parts, dual_parts = keys.parts(), dual_keys.parts(2)
        # what each leaves is what the next takes
        keys(kernels.state_kernel, k, v, parts)
        dual_keys(tangent.state_tangent_kernel, k, v, dk, dv, dual_parts)
        fold, dual_fold = (
            partial(kernels.fold, x, weight, q.dtype, states=n) for x, n in ((parts, 1), (dual_parts, 2))
        )
        _, *left = fold()
        _, *dual_left = dual_fold()
        given = (q, *left, bias, q, o)
        dual_given = (q, dq, *dual_left, bias, q, dq, o, do)
        return {
            "  state": Run(partial(keys, kernels.state_kernel, k, v, parts), tensors=2),
            "  fold": Run(fold),
            "  output": Run(partial(queries, kernels.output_kernel, *given), tensors=3),
            "  state with tangent": Run(
                partial(dual_keys, tangent.state_tangent_kernel, k, v, dk, dv, dual_parts), tensors=4
            ),
            "  fold with tangent": Run(dual_fold),
            "  output with tangent": Run(
                partial(dual_queries, tangent.output_tangent_kernel, *dual_given), tensors=6
            ),
        }

    def forms(self) -> dict[str, Run]:
        """Sparse attention in each of its forms here, which tests/kernels hold to fp64; 8 bits, quantised."""
        from kernels import block_sparse_int8_triton as int8
        from kernels import block_sparse_triton as kernels

        major, minor = torch.cuda.get_device_capability()
        device, dtype, sizes = 10 * major + minor, self.q.dtype, tuple(self.blocks.values())
        blocks = kernels.Blocks(self.index, *sizes)
        calls = {
            f"  {form}": partial(kernels.attention, *self.primals, blocks, form)
            for form in kernels.forms_for("forward", dtype, device, *sizes)
        }
        for form, fp8 in int8.forms_for(device, *sizes):
            paired = not isinstance(form, kernels.Form)
            numbers = int8.quantise(*self.primals, blocks, fp8, paired)
            calls[f"  8 bits, fp8={fp8}, {form}"] = partial(int8.attend, numbers, blocks, form, dtype)
        return {name: Run(call, 4) for name, call in calls.items()}

    def derivatives(self) -> dict[str, Run]:
        """Runs with gradients or a tangent."""
        sparse = partial(sparse_attention, block_index=self.index, **self.blocks)
        operator = self.operators["bf16"]
        return {
            "dense, cuDNN, and gradients": Run(partial(self.gradients, dense), 14, is_dense=True),
            "operator and gradients": Run(partial(self.gradients, operator), 14),
            "sparse and gradients": Run(partial(self.gradients, sparse), 14),
            "linear branch and gradients": Run(partial(self.gradients, self.linear), tensors=12),
            "operator with tangent": Run(partial(self.tangent, operator), 12),
            "sparse with tangent": Run(partial(self.tangent, sparse), 12),
            "linear branch with tangent": Run(partial(self.tangent, self.linear), tensors=10),
        }

    def linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The linear branch and what the sparse one adds, which is q here."""
        return linear_attention(q, k, v, "softmax", self.proj["weight"], self.proj["bias"], add=q)

    def together(self, int8: bool) -> Tensor:
        """The operator but for its block map."""
        projected = ("softmax", self.proj["weight"], self.proj["bias"])
        return sparse_linear_attention(*self.primals, self.index, *projected, **self.blocks, int8=int8)

    def gradients(self, fn: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """Of q, k and v."""
        leaves = [x.detach().requires_grad_() for x in self.primals]
        with torch.enable_grad():
            return torch.autograd.grad(fn(*leaves), leaves, self.grad)

    def tangent(self, fn: Callable[..., Tensor]) -> Tensor:
        """Of the output."""
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, self.primals, self.tangents)
            return forward_ad.unpack_dual(fn(*duals)).tangent

    def errors(self) -> dict[str, float]:
        """Errors of the operator relative to fp64, with the lists of the block map; first and last head."""
        with poisoned():
            got = {name: (core(*self.primals),) for name, core in self.operators.items()}
            got["gradients"] = self.gradients(self.operators["bf16"])
            got["tangent"] = (self.tangent(self.operators["bf16"]),)
        worst = dict.fromkeys(LIMITS, 0.0)
        for head in (slice(0, 1), slice(-1, None)):
            for name, truth in self.truth(head).items():
                off = error_share([x[:, head] for x in got[name]], truth, 1.0)
                # of Python's numbers, max may lose a NaN
                worst[name] = max(worst[name], off if off == off else torch.inf)
        return worst

    def truth(self, head: slice) -> dict[str, tuple[Tensor, ...]]:
        """What LIMITS names, in fp64."""
        q, k, v, grad, *tangents = (x[:, head].double() for x in (*self.primals, self.grad, *self.tangents))
        weight, bias = self.proj["weight"].double(), self.proj["bias"].double()

        def twin(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            sparse, _ = reference.sparse_attention(q, k, v, self.index[:, head], **self.blocks)
            return plain(q, k, v, weight, bias, sparse, "softmax")

        o, do = torch.func.jvp(twin, (q, k, v), tuple(tangents))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            grads = torch.autograd.grad(twin(*leaves), leaves, grad)
        return {"bf16": (o,), "8 bits": (o,), "gradients": grads, "tangent": (do,)}

    def report(self, runs: dict[str, Run], options: Options, console: Console) -> None:
        """Time the runs in turns and print them; the first is the dense one."""
        calls = {name: partial(repeated, run.call, options.calls) for name, run in runs.items()}
        times = {
            name: [ms / options.calls for ms in spent]
            for name, spent in measure(calls, options.repeats).items()
        }
        medians = {name: statistics.median(spent) for name, spent in times.items()}
        yardstick = next(iter(medians.values()))
        for name, run in runs.items():
            ms, keys = medians[name], self.q.shape[2] if run.is_dense else self.kept
            said = f"{run.flop * self.q.numel() * keys / ms / 1e9:.0f} TFLOP/s" if run.flop else "no floor"
            if run.tensors:
                said = f"floor {1e3 * run.tensors * 2 * self.q.numel() / BANDWIDTH:.3f} ms"
            spread = f"{min(times[name]):.3f} to {max(times[name]):.3f}"
            console.print(f"  {name}: {ms:.3f} ms ({spread}), {said}, {yardstick / ms:.1f} x dense")


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fastest on this kind of GPU."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v)


@torch.no_grad()
def main() -> None:
    """Gate, time, print."""
    options = parse(Options, sys.argv[1:])
    blocks = f"blocks of {options.block_q} queries and {options.block_k} keys"
    console = gpu_console(f"width {options.width}, {blocks}")
    given = (
        map(kind, text.split(","))
        for kind, text in ((int, options.heads), (int, options.tokens), (float, options.ratio))
    )
    counts = set()
    for heads, tokens, ratio in product(*given):
        bench, counts = Bench(options, heads, tokens, ratio), counts | {heads}
        errors = bench.errors()
        console.print(f"{heads} heads x {tokens}, {bench.kept} keys a query; errors {errors}")
        if wrong := [name for name, off in errors.items() if off > LIMITS[name]]:
            raise UserError(f"wrong, so not timed: {', '.join(wrong)}")
        bench.report(bench.forward(), options, console)
        if len(counts) == 1:
            bench.report(bench.derivatives(), options, console)


if __name__ == "__main__":
    main()
