"""Layers of the causal video autoencoder.

Every layer works on (B, C, T, H, W) and looks back in time only, so a clip may pass through in pieces. What a
piece must know of the pieces before it is kept in a `Past`, filled by the layers and owned by the caller;
without one the input is a whole clip. Activations lie channels-last in memory, which the layers preserve and
convolutions prefer. Parameter names are those of the published Wan checkpoints.
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import pixels
from kernels.causal_conv import causal_conv as convolve_causal
from kernels.reference_pixels import rms_norm
from kernels.wide_attention import wide_attention

Past = dict[nn.Conv3d, Tensor]
# what a convolution gives, and the bias that is still to be added
Biased = tuple[Tensor, Tensor | None]


def causal_conv(in_channels: int, out_channels: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> nn.Conv3d:
    """A convolution that keeps height and width, and expects its time padding from `extend`."""
    return nn.Conv3d(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))


def extend(conv: nn.Conv3d, x: Tensor, past: Past | None) -> Tensor:
    """Put before x the kernel - 1 frames that precede it: remembered ones, or zeros where the clip begins."""
    return remember(conv, torch.cat([before(conv, x, past), x], dim=2), past)


def before(conv: nn.Conv3d, x: Tensor, past: Past | None) -> Tensor:
    """The frames that `extend` puts before x."""
    if past is not None and conv in past:
        return past[conv]
    b, c, _, h, w = x.shape
    return x.new_zeros(b, conv.kernel_size[0] - 1, h, w, c).movedim(-1, 1)


def remember(conv: nn.Conv3d, x: Tensor, past: Past | None) -> Tensor:
    """Keep of an extended x what the next piece needs."""
    if past is not None:
        # a copy: a view would keep the whole piece alive
        past[conv] = x[:, :, 1 - conv.kernel_size[0] :].clone(memory_format=torch.channels_last_3d)
    return x


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a layer for images (N, C, H, W) to every frame of x."""
    return layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class RMSNorm(nn.Module):
    """Scale every pixel's channel vector to unit mean square, then each channel by gamma.

    Computed in fp32, rounded to the input's dtype before gamma. `axes` counts the axes after the channels.
    """

    def __init__(self, channels: int, *, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, ...) -> the same shape and dtype."""
        return rms_norm(x, self.gamma)


def activated(norm: RMSNorm, conv: nn.Conv3d, x: Biased, past: Past | None) -> Tensor:
    """What a pre-activated causal convolution takes, from what the one before it gave."""
    y = pixels.norm_silu(*x, norm.gamma, before(conv, x[0], past))
    return remember(conv, y, past)


def convolve(conv: nn.Conv3d, x: Tensor) -> Biased:
    """A causal convolution, and its bias where the next kernel adds that on its way: alone it is a pass."""
    if pixels.fuses(x):
        return convolve_causal(x, conv.weight), conv.bias
    return conv(x), None


def norm_silu_conv(norm: RMSNorm, conv: nn.Conv3d, x: Tensor, past: Past | None) -> Tensor:
    """The pre-activated causal convolution of heads."""
    return conv(activated(norm, conv, (x, None), past))


class ResidualBlock(nn.Module):
    """Two pre-activated 3x3x3 convolutions around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # the published names count activations and a dropout as well
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(in_channels),
                "2": causal_conv(in_channels, out_channels),
                "3": RMSNorm(out_channels),
                "6": causal_conv(out_channels, out_channels),
            }
        )
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """x (B, in, T, H, W) -> (B, out, T, H, W)."""
        norm1, conv1, norm2, conv2 = self.residual.values()
        y = convolve(conv1, activated(norm1, conv1, (x, None), past))
        y = convolve(conv2, activated(norm2, conv2, y, past))
        return pixels.add(*y, self.shortcut(x))


class Attention(nn.Module):
    """Single-head self-attention among the pixels of each frame, around a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        # training starts from a convolutional network
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, T, H, W) -> the same shape."""
        return x + per_frame(self._attend, x)

    def _attend(self, x: Tensor) -> Tensor:
        # one head of the full width, contiguous in memory as the fused kernels want it
        qkv = rearrange(self.to_qkv(self.norm(x)), "n c h w -> n (h w) c").contiguous()
        out = wide_attention(*qkv.chunk(3, dim=-1))
        return self.proj(rearrange(out, "n (h w) c -> n c h w", h=x.shape[2]))


class Middle(nn.ModuleList):
    """Residual block, attention, residual block at the coarsest level."""

    def __init__(self, channels: int) -> None:
        before, after = ResidualBlock(channels, channels), ResidualBlock(channels, channels)
        super().__init__([before, Attention(channels), after])

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """x (B, C, T, H, W) -> the same shape."""
        before, attention, after = self
        return after(attention(before(x, past)), past)


class Downsample(nn.Module):
    """Halve height and width and, with `temporal`, the frames after the clip's first, which stays alone."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """x (B, C, T, H, W) -> (B, C, T', H/2, W/2); T' = (T + 1) / 2 where a clip begins, else T / 2."""
        x = per_frame(lambda frames: self.resample["1"](F.pad(frames, (0, 1, 0, 1))), x)
        if self.time_conv is None:
            return x
        previous = None if past is None else past.get(self.time_conv)
        if past is not None:
            past[self.time_conv] = x[:, :, -1:].clone(memory_format=torch.channels_last_3d)
        if previous is not None:
            return self.time_conv(torch.cat([previous, x], dim=2))
        return x if x.shape[2] == 1 else torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class Upsample(nn.Module):
    """Double height and width and, with `temporal`, the frames after the clip's first, which stays alone."""

    def __init__(self, in_channels: int, out_channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(in_channels, out_channels, 3, padding=1)})
        self.time_conv = causal_conv(in_channels, 2 * in_channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """x (B, in, T, H, W) -> (B, out, T', 2H, 2W); T' = 2T - 1 where a clip begins, else 2T."""
        if self.time_conv is not None:
            x = self._double_frames(self.time_conv, x, past)
        return per_frame(self.resample["1"], pixels.enlarge(x))

    @staticmethod
    def _double_frames(conv: nn.Conv3d, x: Tensor, past: Past | None) -> Tensor:
        first = None
        if past is None or conv not in past:
            # the first frame is neither doubled nor part of the next ones' history
            first, x = x[:, :, :1], x[:, :, 1:]
        x = extend(conv, x, past)
        if first is not None and x.shape[2] < conv.kernel_size[0]:
            return first
        # moving the channels after the copy keeps them last in memory
        x = rearrange(conv(x), "b (two c) t h w -> b (t two) h w c", two=2).movedim(-1, 1)
        return x if first is None else torch.cat([first, x], dim=2)


def average_down(x: Tensor, channels: int, factors: tuple[int, int]) -> Tensor:
    """Fold time and space into channels by `factors` (time, space), then average groups to `channels`."""
    time, space = factors
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % time, 0))
    x = rearrange(x, "b c (t i) (h j) (w k) -> b (c i j k) t h w", i=time, j=space, k=space)
    return x.unflatten(1, (channels, -1)).mean(dim=2)


def repeat_up(x: Tensor, channels: int, factors: tuple[int, int]) -> Tensor:
    """Repeat channels and unfold them into time and space by `factors` (time, space), leaving `channels`."""
    time, space = factors
    x = x.repeat_interleave(channels * time * space**2 // x.shape[1], dim=1)
    return rearrange(x, "b (c i j k) t h w -> b c (t i) (h j) (w k)", i=time, j=space, k=space)


class DownGroup(nn.Module):
    """One encoder level of Wan2.2: its layers inside a shortcut without parameters."""

    def __init__(self, layers: Sequence[nn.Module], out_channels: int, factors: tuple[int, int]) -> None:
        super().__init__()
        self.downsamples = nn.ModuleList(layers)
        self.out_channels = out_channels
        self.factors = factors

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """Shapes as the layers'."""
        shortcut = average_down(x, self.out_channels, self.factors)
        for layer in self.downsamples:
            x = layer(x, past)
        return x + shortcut


class UpGroup(nn.Module):
    """One decoder level of Wan2.2: its layers in a parameter-free shortcut, which `factors` None omits."""

    def __init__(
        self, layers: Sequence[nn.Module], out_channels: int, factors: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.upsamples = nn.ModuleList(layers)
        self.out_channels = out_channels
        self.factors = factors

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """Shapes as the layers'."""
        source = x
        for layer in self.upsamples:
            x = layer(x, past)
        if self.factors is None:
            return x
        # where a clip begins, the layers leave its first frame single: drop that frame's earlier copies
        return x + repeat_up(source, self.out_channels, self.factors)[:, :, -x.shape[2] :]
