"""Context parallelism (Ulysses, arXiv:2309.14509): processes share the tokens of a network.

Each has some of the tokens, in a row, and for self-attention all tokens of some heads instead: what attends
sees the whole sequence and nothing else, whatever it is and whatever the length.

Shapes: B samples, L tokens, l those of a rank, N heads, n those of a rank, D head width, P ranks, E features.
"""

from weakref import WeakSet

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_map_only

from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel


def split_tokens(network: WanModel, ranks: dist.ProcessGroup) -> None:
    """Have the ranks of a group, which call the network together and on equal inputs, share its tokens.

    All get the whole velocity.  Where all compute the same loss from it, a parameter's gradient is this
    rank's part of a sum over the ranks, and an input's is whole.  Raises UserError for heads that do not
    divide; a forward does for fewer tokens than ranks.
    """
    check_heads(network.config["heads"], ranks.size())
    split = _Split(ranks)
    network.register_forward_pre_hook(split.enter_network, with_kwargs=True)
    for block in network.blocks:
        block.register_forward_pre_hook(split.enter_block)
        block.self_attn.register_forward_pre_hook(split.enter_attention)
    network.head.register_forward_pre_hook(split.enter_head)
    network.head.register_forward_hook(split.leave_head)


def check_heads(heads: int, count: int) -> None:
    """UserError for a network that so many processes can not share."""
    if heads % count:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(f"{count} processes can not share a network of {heads} heads: take one of {fitting}")


def shares(length: int, count: int) -> list[int]:
    """A length in `count` parts as even as can be, the longer ones first."""
    short, longer = divmod(length, count)
    return [short + (i < longer) for i in range(count)]


class _Split:
    """The hooks of one network; those within a block run between the parts of it that are compiled."""

    def __init__(self, ranks: dist.ProcessGroup):
        self.ranks = ranks
        self.lengths: list[int] = []  # tokens of each rank
        self.cores: WeakSet[nn.Module] = WeakSet()  # that have their hooks

    def enter_network(
        self, network: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        return tree_map_only(Tensor, self._shared, (args, kwargs))

    def enter_block(self, block: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
        tokens, time, table, *given = args
        if tokens.shape[1] == len(table[0]):  # of the first block that runs
            if tokens.shape[1] < self.ranks.size():
                raise UserError(f"{self.ranks.size()} processes can not share {tokens.shape[1]} tokens")
            tokens = self._own(tokens, 1).contiguous()
        return tokens, self._own_times(time), table, *given

    @torch.compiler.disable
    def enter_attention(self, attention: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
        # here, not in the block: this runs again where a backward computes a block again
        x, table, *given = args
        self.lengths = shares(len(table[0]), self.ranks.size())
        if attention.core not in self.cores:  # or no longer: set_attention() makes new ones
            attention.core.register_forward_pre_hook(self.enter_core)
            attention.core.register_forward_hook(self.leave_core)
            self.cores.add(attention.core)
        return x, tuple(self._own(part, 0) for part in table), *given

    @torch.compiler.disable
    def enter_core(self, core: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """q, k, v: (B, N, l, D) -> (B, n, L, D)."""
        ours = [self._own_length] * self.ranks.size()

        def gathered(x: Tensor) -> Tensor:
            parts = rearrange(x, "b (p n) l d -> (p l) b n d", p=self.ranks.size())
            return rearrange(_Exchange.apply(parts, ours, self.lengths, self.ranks), "l b n d -> b n l d")

        return tuple(gathered(x) for x in args)

    @torch.compiler.disable
    def leave_core(self, core: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """(B, n, L, D) -> (B, N, l, D)."""
        ours = [self._own_length] * self.ranks.size()
        x = _Exchange.apply(rearrange(out, "b n l d -> l b n d"), self.lengths, ours, self.ranks)
        # in memory as the network wants it next
        return rearrange(x, "(p l) b n d -> b l (p n) d", p=self.ranks.size()).transpose(1, 2)

    def enter_head(self, head: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        tokens, time = args
        return tokens, self._own_times(time)

    def leave_head(self, head: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """(B, l, E) -> (B, L, E)."""
        return _Gather.apply(out.transpose(0, 1), self.lengths, self.ranks).transpose(0, 1)

    @property
    def _own_length(self) -> int:
        return self.lengths[self.ranks.rank()]

    def _own(self, x: Tensor, dim: int) -> Tensor:
        return x.tensor_split(self.ranks.size(), dim)[self.ranks.rank()]

    def _own_times(self, time: Tensor) -> Tensor:
        return time if time.shape[1] == 1 else self._own(time, 1)

    def _shared(self, x: Tensor) -> Tensor:
        """An input, whose gradient is the sum of what the ranks' tokens make of it."""
        if not (x.requires_grad and torch.is_grad_enabled()):
            return x

        def summed(grad: Tensor) -> Tensor:
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad, group=self.ranks)
            return grad

        x = x.view_as(x)  # else the hook would also see gradients of other uses
        x.register_hook(summed)
        return x


def exchanged(x: Tensor, sent: list[int], received: list[int], ranks: dist.ProcessGroup) -> Tensor:
    """Rows of x, to each rank in turn as many as said -> rows from each rank in turn."""
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=ranks)
    return out


# our own: through torch's functional collectives a tangent comes out as zero
class _Exchange(torch.autograd.Function):
    """`exchanged`, with its derivatives."""

    @staticmethod
    def forward(x: Tensor, sent: list[int], received: list[int], ranks: dist.ProcessGroup) -> Tensor:
        return exchanged(x, sent, received, ranks)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
        _, ctx.sent, ctx.received, ctx.ranks = inputs

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return exchanged(grad, ctx.received, ctx.sent, ctx.ranks), None, None, None

    @staticmethod
    def jvp(ctx: FunctionCtx, tangent: Tensor, *_: None) -> Tensor:
        return exchanged(tangent, ctx.sent, ctx.received, ctx.ranks)


class _Gather(torch.autograd.Function):
    """Rows of all ranks.  The gradient is of a loss that all of them compute: each takes its rows of it."""

    @staticmethod
    def forward(x: Tensor, lengths: list[int], ranks: dist.ProcessGroup) -> Tensor:
        copies = x.expand(ranks.size(), *x.shape).flatten(0, 1)
        return exchanged(copies, [len(x)] * ranks.size(), lengths, ranks)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
        _, ctx.lengths, ctx.ranks = inputs

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.split(ctx.lengths)[ctx.ranks.rank()], None, None

    @staticmethod
    def jvp(ctx: FunctionCtx, tangent: Tensor, *_: None) -> Tensor:
        return _Gather.forward(tangent, ctx.lengths, ctx.ranks)
