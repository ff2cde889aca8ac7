"""Time of sparse-linear attention on one GPU, whole and in parts, beside PyTorch's dense attention, in bf16.

    python -m tools.bench.sla heads=12,40 tokens=32760,75600 ratio=0.1,0.05

The operator must agree with fp64 first, as do its derivatives.  Work is that of the selected blocks: 4 FLOP
for a row, key and channel forward, 12 with a tangent, 14 forward and backward; of what waits for memory it is
tensors, read or written once.  Derivatives, beside dense attention with its gradients, are timed for the
first number of heads alone.  Indented: the kernels' forms, which tests/kernels hold to fp64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from kernels import reference
from kernels.block_map import block_map
from kernels.block_sparse import sparse_attention
from kernels.block_sparse_int8 import ALLOWED, sparse_attention_int8
from kernels.block_sparse_linear import sparse_linear_attention
from kernels.linear_attention import linear_attention, plain
from kernels.selftest import error_share
from tools.bench.timing import Run, Tables, Timing, cudnn, sizes, start
from turbodiffusion.attention import SparseLinearAttention

# bf16 rounds at 2e-3 of a number's size, a few times on the way
BF16_ALLOWED = 1e-2
# of what Bench.exact gives
OUTPUT, TANGENT, GRADIENTS = slice(0, 1), slice(1, 2), slice(2, 5)


@dataclass
class Options(Timing):
    """The command line."""

    heads: str = "12,40"
    tokens: str = "32760,75600"
    ratio: str = "0.1,0.05"
    width: int = 128
    block_q: int = 64
    block_k: int = 64


class Bench:
    """The operator and its inputs (1, N, L, D), tokens first in memory, with tangents and a gradient."""

    def __init__(self, options: Options, heads: int, tokens: int, ratio: float):
        size = (1, tokens, heads, options.width)
        drawn = [torch.randn(size, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(7)]
        self.primals, self.tangents, self.grad = drawn[:3], drawn[3:6], drawn[6]
        self.blocks = {"block_q": options.block_q, "block_k": options.block_k}
        self.operator, self.eight = (
            SparseLinearAttention(options.width, ratio=ratio, **self.blocks, int8=int8)
            .requires_grad_(False)
            .to("cuda", torch.bfloat16)
            for int8 in (False, True)
        )
        self.projection = self.operator.proj_l["weight"], self.operator.proj_l["bias"]
        nn.init.normal_(self.projection[0], std=options.width**-0.5)
        self.eight.load_state_dict(self.operator.state_dict())
        self.map = partial(block_map, *self.primals[:2], **self.blocks, ratio=ratio)
        self.index = self.map()
        self.tokens, self.kept = tokens, self.index.shape[-1] * options.block_k
        self.sparse = partial(sparse_attention, block_index=self.index, **self.blocks)
        self.truth = [torch.cat(pair, 1) for pair in zip(*map(self.exact, (0, heads - 1)), strict=True)]

    def exact(self, head: int) -> tuple[Tensor, ...]:
        """What the operator makes of a head in fp64: the output, its tangent, and gradients of q, k and v."""
        drawn = (*self.primals, *self.tangents, self.grad)
        q, k, v, *tangents, grad = (x[:, head : head + 1].double() for x in drawn)
        weight, bias = (x.double() for x in self.projection)
        index = self.index[:, head : head + 1]

        def twin(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            sparse, _ = reference.sparse_attention(q, k, v, index, **self.blocks)
            return plain(q, k, v, weight, bias, sparse, "softmax")

        leaves = [x.requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            gradients = torch.autograd.grad(twin(*leaves), leaves, grad)
        return *torch.func.jvp(twin, (q.detach(), k.detach(), v.detach()), tuple(tangents)), *gradients

    def run(
        self, call: Callable[[], object], flop: int, of: slice | None = None, allowed: float = BF16_ALLOWED
    ) -> Run:
        """With FLOP for a row, key and channel; of: what of `exact` it must give, first and last head."""

        def share(got: Tensor | tuple[Tensor, ...]) -> float:
            got = (got,) if isinstance(got, Tensor) else got
            return error_share([x[:, [0, -1]] for x in got], self.truth[of], allowed)

        return Run(call, flop * self.kept * self.grad.numel(), share=None if of is None else share)

    def waiting(self, call: Callable[[], object], tensors: int) -> Run:
        """Of what reads or writes so many tensors like q."""
        return Run(call, moved=2 * tensors * self.grad.numel())

    def dense(self, call: Callable[[], object], flop: int) -> Run:
        """PyTorch's, of all keys."""
        return Run(call, flop * self.tokens * self.grad.numel())

    def forward(self) -> dict[str, Run]:
        """Runs of outputs alone."""
        given = (*self.primals, self.index, "softmax", *self.projection)
        together = partial(sparse_linear_attention, *given, **self.blocks)
        eight = partial(sparse_attention_int8, *self.primals, self.index, **self.blocks)
        return {
            "dense, cuDNN": self.dense(partial(cudnn, *self.primals), 4),
            "operator, bf16": self.run(partial(self.operator, *self.primals), 4, OUTPUT),
            "operator, 8 bits": self.run(partial(self.eight, *self.primals), 4, OUTPUT, ALLOWED["e4m3"]),
            "block map": self.waiting(self.map, 2),
            "sparse, bf16": self.run(partial(self.sparse, *self.primals), 4),
            "sparse, 8 bits": self.run(eight, 4),
            "linear branch": self.waiting(partial(self.linear, *self.primals), 5),
            "all but the map, bf16": self.run(together, 4, OUTPUT),
            "all but the map, 8 bits": self.run(partial(together, int8=True), 4, OUTPUT, ALLOWED["e4m3"]),
            **self.forms(),
        }

    def forms(self) -> dict[str, Run]:
        """Sparse attention in each of its forms here; those in 8 bits of what is quantised."""
        from kernels import block_sparse_int8_triton as int8
        from kernels import block_sparse_triton as kernels

        major, minor = torch.cuda.get_device_capability()
        device, dtype, spans = 10 * major + minor, self.grad.dtype, tuple(self.blocks.values())
        blocks, calls = kernels.Blocks(self.index, *spans), {}
        for form in kernels.forms_for("forward", dtype, device, *spans):
            calls[f"  {form}"] = partial(kernels.attention, *self.primals, blocks, form)
        for form, fp8 in int8.forms_for(device, *spans):
            numbers = int8.quantise(*self.primals, blocks, fp8, not isinstance(form, kernels.Form))
            calls[f"  8 bits, fp8={fp8}, {form}"] = partial(int8.attend, numbers, blocks, form, dtype)
        return {name: self.run(call, 4) for name, call in calls.items()}

    def derivatives(self) -> dict[str, Run]:
        """Runs with gradients or a tangent."""
        gradients, tangent = (partial(partial, of) for of in (self.gradients, self.tangent))
        return {
            "dense, cuDNN, and gradients": self.dense(gradients(cudnn), 14),
            "operator and gradients": self.run(gradients(self.operator), 14, GRADIENTS),
            "sparse and gradients": self.run(gradients(self.sparse), 14),
            "linear branch and gradients": self.waiting(gradients(self.linear), 12),
            "operator with tangent": self.run(tangent(self.operator), 12, TANGENT),
            "sparse with tangent": self.run(tangent(self.sparse), 12),
            "linear branch with tangent": self.waiting(tangent(self.linear), 10),
        }

    def linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The linear branch and what the sparse one adds, which is q here."""
        return linear_attention(q, k, v, "softmax", *self.projection, add=q)

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


def tables(options: Options) -> Tables:
    """Every size with every ratio."""
    counts, ratios = sizes(options.heads), map(float, options.ratio.split(","))
    for (heads,), (tokens,), ratio in product(counts, sizes(options.tokens), ratios):
        bench = Bench(options, heads, tokens, ratio)
        yield f"{heads} heads x {tokens}, {bench.kept} keys a query", bench.forward()
        if (heads,) == counts[0]:
            yield "", bench.derivatives()


main = partial(start, Options, tables)

if __name__ == "__main__":
    main()
