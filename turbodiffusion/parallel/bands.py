"""A video autoencoder shared by processes: each has a band of a picture's rows, at every level.

A layer that looks at neighbouring rows gets them from the neighbours, and what they became is cut off after
it, so that every row is what one process makes of it.  Attention, which sees a whole frame, is shared by
frames instead.

Shapes: B samples, C channels, T frames, t those of a rank, H rows, h those of a rank, W columns, P ranks.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from turbodiffusion.errors import UserError
from turbodiffusion.models.vae import Decoder, Encoder, VideoVAE
from turbodiffusion.models.vae_layers import Attention, Downsample, ResidualBlock, Upsample
from turbodiffusion.parallel.context import exchanged, shares

Reach = tuple[int, int]

# rows above and below that a layer looks at
EDGE = (1, 1)
REACH: dict[type[nn.Module], Reach] = {ResidualBlock: (2, 2), Upsample: EDGE, Downsample: (0, 1)}
# latent rows of a band: what residual blocks borrow of it
LEAST = 2


def split_rows(vae: VideoVAE, ranks: dist.ProcessGroup) -> None:
    """Have the ranks of a group, which call the autoencoder together and on equal inputs, share its rows.

    All get the whole result.  Where `band_rows` gives none, each makes it alone.  A call raises UserError
    where gradients are recorded: they would not pass from rank to rank.
    """
    for half in (vae.encoder, vae.decoder):
        split = _Split(half, ranks)
        half.register_forward_pre_hook(split.enter)
        half.register_forward_hook(split.whenever_shared(split.leave))
        layers = {layer: REACH[type(layer)] for layer in half.modules() if type(layer) in REACH}
        for layer, reach in (layers | {half.conv1: EDGE, half.head["2"]: EDGE}).items():
            layer.register_forward_pre_hook(split.whenever_shared(partial(split.borrow, reach)))
            layer.register_forward_hook(split.whenever_shared(partial(split.cut, reach)))
        for layer in half.modules():
            if isinstance(layer, Attention):
                layer.register_forward_pre_hook(split.whenever_shared(split.enter_attention))
                layer.register_forward_hook(split.whenever_shared(split.leave_attention))


def band_rows(rows: int, count: int) -> list[int]:
    """Latent rows of each of so many ranks; none for pictures too low for all of them."""
    lengths = shares(rows, count)
    return lengths if min(lengths) >= LEAST else []


class _Split:
    """The hooks of an encoder or a decoder."""

    def __init__(self, half: Encoder | Decoder, ranks: dist.ProcessGroup):
        self.ranks, self.own = ranks, ranks.rank()
        # rows of the input in a latent row
        self.factor = 2 ** sum(isinstance(layer, Downsample) for layer in half.modules())
        self.rows: list[int] = []  # of each rank in latents; none where nothing is shared
        self.frames: list[int] = []  # of each rank, in attention

    def whenever_shared(self, hook: Callable[..., object]) -> Callable[..., object]:
        return lambda *args: hook(*args) if self.rows else None

    def enter(self, half: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
        """(B, C, T, H, W) -> (B, C, T, h, W)."""
        if torch.is_grad_enabled():
            raise UserError("an autoencoder that processes share has no gradients: use torch.no_grad()")
        x, *given = args
        self.rows = band_rows(x.shape[3] // self.factor, self.ranks.size())
        if not self.rows:
            return args
        return x.split([self.factor * h for h in self.rows], dim=3)[self.own], *given

    def leave(self, half: nn.Module, args: tuple[object, ...], out: Tensor) -> Tensor:
        """(B, C, T, h, W) -> (B, C, T, H, W)."""
        scale = out.shape[3] // self.rows[self.own]
        sizes = [(out.shape[2], scale * h) for h in self.rows]
        return _joined(self._exchange([out] * len(sizes), sizes), 3)

    def borrow(self, reach: Reach, layer: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
        """(B, C, T, h, W), and around it the rows that the layer looks at."""
        (x, *given), (above, below) = args, reach
        sent = {self.own - 1: x[:, :, :, :below], self.own + 1: x[:, :, :, x.shape[3] - above :]}
        wanted = {self.own - 1: above, self.own + 1: below}
        ranks = range(self.ranks.size())
        parts = [sent.get(rank, x[:, :, :, :0]) for rank in ranks]
        parts = self._exchange(parts, [(x.shape[2], wanted.get(rank, 0)) for rank in ranks])
        parts[self.own] = x
        return _joined(parts, 3), *given

    def cut(self, reach: Reach, layer: nn.Module, args: tuple[object, ...], out: Tensor) -> Tensor:
        """Without what became of borrowed rows."""
        # 0 of a downsampling, which looks at a row more and makes none of it
        scale = out.shape[3] // args[0].shape[3]
        above = scale * reach[0] * (self.own > 0)
        below = scale * reach[1] * (self.own < self.ranks.size() - 1)
        return out[:, :, :, above : out.shape[3] - below]

    def enter_attention(self, layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """(B, C, T, h, W) -> (B, C, t, H, W)."""
        self.frames = shares(args[0].shape[2], self.ranks.size())
        sizes = [(self.frames[self.own], h) for h in self.rows]
        return (_joined(self._exchange(args[0].split(self.frames, dim=2), sizes), 3),)

    def leave_attention(self, layer: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        """(B, C, t, H, W) -> (B, C, T, h, W)."""
        sizes = [(t, self.rows[self.own]) for t in self.frames]
        return _joined(self._exchange(out.split(self.rows, dim=3), sizes), 2)

    def _exchange(self, parts: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Of parts (B, C, t, h, W) one to each rank -> one from each, of such (t, h), channels last."""
        b, c, _, _, w = parts[0].shape
        flat = [part.movedim(1, -1).flatten() for part in parts]
        counts = [b * t * h * w * c for t, h in sizes]
        got = exchanged(torch.cat(flat), [len(part) for part in flat], counts, self.ranks).split(counts)
        return [x.view(b, t, h, w, c).movedim(-1, 1) for x, (t, h) in zip(got, sizes, strict=True)]


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Side by side; of empty ones PyTorch can not see that channels are last in memory."""
    return torch.cat([part for part in parts if part.numel()] or parts, dim)
