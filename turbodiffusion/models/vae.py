"""The causal video autoencoder of Wan: Wan2.1, Wan2.2 and small ones, by size."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from turbodiffusion.errors import UserError
from turbodiffusion.models.vae_layers import (
    DownGroup,
    Downsample,
    Middle,
    Past,
    ResidualBlock,
    RMSNorm,
    UpGroup,
    Upsample,
    causal_conv,
    extend,
    norm_silu_conv,
)


class Layout(NamedTuple):
    """What both halves share: residual blocks per level, which levels halve time, if levels are grouped."""

    res_blocks: int
    temporal: list[bool]
    grouped: bool


class Encoder(nn.Module):
    """Pixels to moments: levels of residual blocks, each but the last followed by a downsampling."""

    def __init__(self, channels: tuple[int, int], widths: Sequence[int], layout: Layout) -> None:
        super().__init__()
        res_blocks, temporal, grouped = layout
        width = widths[0]
        self.conv1 = causal_conv(channels[0], width)
        levels: list[nn.Module] = []
        for level, out in enumerate(widths[1:]):
            is_last = level == len(temporal)
            layers: list[nn.Module] = [ResidualBlock(width, out)]
            layers += [ResidualBlock(out, out) for _ in range(res_blocks - 1)]
            if not is_last:
                layers.append(Downsample(out, temporal=temporal[level]))
            if grouped:
                factors = (1, 1) if is_last else (1 + temporal[level], 2)
                layers = [DownGroup(layers, out, factors)]
            levels += layers
            width = out
        self.downsamples = nn.ModuleList(levels)
        self.middle = Middle(width)
        self.head = nn.ModuleDict({"0": RMSNorm(width), "2": causal_conv(width, channels[1])})

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """x (B, in, F, H, W) -> (B, out, T, h, w)."""
        x = self.conv1(extend(self.conv1, x, past))
        for layer in self.downsamples:
            x = layer(x, past)
        return norm_silu_conv(*self.head.values(), self.middle(x, past), past)


class Decoder(nn.Module):
    """Latents to pixels: levels of residual blocks, each but the last followed by an upsampling."""

    def __init__(self, channels: tuple[int, int], widths: Sequence[int], layout: Layout) -> None:
        super().__init__()
        res_blocks, temporal, grouped = layout.res_blocks, layout.temporal[::-1], layout.grouped
        width = widths[0]
        self.conv1 = causal_conv(channels[0], width)
        self.middle = Middle(width)
        levels: list[nn.Module] = []
        for level, out in enumerate(widths[1:]):
            is_last = level == len(temporal)
            layers: list[nn.Module] = [ResidualBlock(width, out)]
            layers += [ResidualBlock(out, out) for _ in range(res_blocks)]
            width = out
            if not is_last:
                width = out if grouped else out // 2
                layers.append(Upsample(out, width, temporal=temporal[level]))
            if grouped:
                factors = None if is_last else (1 + temporal[level], 2)
                layers = [UpGroup(layers, out, factors)]
            levels += layers
        self.upsamples = nn.ModuleList(levels)
        self.head = nn.ModuleDict({"0": RMSNorm(width), "2": causal_conv(width, channels[1])})

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """x (B, in, T, h, w) -> (B, out, F, H, W)."""
        x = self.middle(self.conv1(extend(self.conv1, x, past)), past)
        for layer in self.upsamples:
            x = layer(x, past)
        return norm_silu_conv(*self.head.values(), x, past)


class VideoVAE(nn.Module):
    """Frames in [-1, 1] to normalised latents and back; a clip has 1 + n * temporal_factor frames.

    With `patch` 2 it is a Wan2.2 autoencoder: pixels folded into channels outside, levels grouped under
    shortcuts inside. `temporal` says which of the encoder's downsamplings halve time; the decoder mirrors it.
    `latent_mean` and `latent_std` (a value for each channel) stay fp32 whatever dtype the weights take.
    Parameter names are those of the published checkpoints.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(  # noqa: PLR0913 (the published sizes)
        self,
        *,
        base: int = 96,
        decoder_base: int | None = None,
        latent_channels: int = 16,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        res_blocks: int = 2,
        temporal: Sequence[bool] = (False, True, True),
        patch: int = 1,
        latent_mean: Sequence[float],
        latent_std: Sequence[float],
    ) -> None:
        super().__init__()
        _check_sizes(latent_channels, multipliers, temporal, (latent_mean, latent_std))
        decoder_base = decoder_base or base
        self.config = {
            "base": base,
            "decoder_base": decoder_base,
            "latent_channels": latent_channels,
            "multipliers": list(multipliers),
            "res_blocks": res_blocks,
            "temporal": list(temporal),
            "patch": patch,
            "latent_mean": list(latent_mean),
            "latent_std": list(latent_std),
        }
        self.latent_channels = latent_channels
        self.temporal_factor = 2 ** sum(temporal)
        self.spatial_factor = patch * 2 ** len(temporal)
        self.patch = patch
        pixels, moments = 3 * patch**2, 2 * latent_channels
        layout = Layout(res_blocks, list(temporal), patch > 1)
        self.encoder = Encoder((pixels, moments), [base * m for m in (1, *multipliers)], layout)
        self.conv1 = nn.Conv3d(moments, moments, 1)
        self.conv2 = nn.Conv3d(latent_channels, latent_channels, 1)
        widths = [decoder_base * m for m in (multipliers[-1], *reversed(multipliers))]
        self.decoder = Decoder((latent_channels, pixels), widths, layout)
        for name in ("latent_mean", "latent_std"):
            self.register_buffer(name, self._statistic(name, torch.device("cpu")), persistent=False)

    def encode(self, frames: Tensor, *, chunk: int | None = 1) -> Tensor:
        """Frames (B, 3, F, H, W) in [-1, 1] -> normalised latents (B, C, T, h, w), fp32: the mean, unsampled.

        `chunk` latent frames are made at a time, all with None: memory for speed, the result is the same.
        Raises UserError if F is not 1 + n * temporal_factor or spatial_factor does not divide H and W.
        """
        self.check_frames(frames)
        length = 1 + (frames.shape[2] - 1) // self.temporal_factor
        mean = _join(self._encode_pieces(frames, _chunk_size(chunk, length), length), length)
        return (mean - self.latent_mean.to(mean.device)) / self.latent_std.to(mean.device)

    def decode(
        self, latents: Tensor, *, chunk: int | None = 1, on_frames: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """Normalised latents (B, C, T, h, w) -> frames (B, 3, F, H, W) in [-1, 1], fp32, clamped.

        `chunk` latent frames are decoded at a time, all with None: memory for speed, the result is the same.
        `on_frames` gets each piece (B, 3, f, H, W) when made. Raises UserError for a wrong shape.
        """
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels or not latents.numel():
            raise UserError(
                f"got latents of shape {tuple(latents.shape)}; "
                f"this VAE decodes (B, {self.latent_channels}, T, h, w)"
            )
        length = latents.shape[2]
        pieces = self._decode_pieces(latents, _chunk_size(chunk, length), on_frames)
        return _join(pieces, 1 + (length - 1) * self.temporal_factor)

    def moments(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (B, 3, F, H, W) -> mean and log-variance (B, C, T, h, w), unnormalised, fp32, one pass."""
        self.check_frames(frames)
        mean, logvar = self._moments(frames, None).chunk(2, dim=1)
        return mean, logvar

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Unnormalised latents (B, C, T, h, w) -> frames (B, 3, F, H, W), not clamped, fp32, in one pass."""
        return self._pixels(latents, None)

    def check_frames(self, frames: Tensor) -> None:
        """Raise UserError, naming the nearest shape that fits, unless frames (B, 3, F, H, W) do."""
        if frames.ndim != 5 or frames.shape[1] != 3 or not frames.numel():
            raise UserError(f"got frames of shape {tuple(frames.shape)}; this VAE encodes (B, 3, F, H, W)")
        count, height, width = frames.shape[2:]
        time, space = self.temporal_factor, self.spatial_factor
        if count % time != 1 % time:
            lower = (count - 1) // time * time + 1
            raise UserError(
                f"got {count} frames; this VAE encodes 1 + {time}n frames: use {lower} or {lower + time}"
            )
        if height % space or width % space:
            nearest = [max(1, (side + space // 2) // space) * space for side in (height, width)]
            raise UserError(
                f"got frames of {width}x{height} pixels; both sides must divide by {space}: "
                f"use {nearest[1]}x{nearest[0]}"
            )

    def _encode_pieces(self, frames: Tensor, chunk: int, length: int) -> Iterator[Tensor]:
        past: Past | None = {} if chunk < length else None
        for start in range(0, length, chunk):
            # latent i > 0 stands for frames f (i - 1) + 1 ... f i, latent 0 for frame 0
            first, last = (self.temporal_factor * i for i in (start - 1, min(start + chunk, length) - 1))
            piece = frames[:, :, max(0, first + 1) : last + 1]
            yield self._moments(piece, past)[:, : self.latent_channels]

    def _decode_pieces(
        self, latents: Tensor, chunk: int, on_frames: Callable[[Tensor], None] | None
    ) -> Iterator[Tensor]:
        past: Past | None = {} if chunk < latents.shape[2] else None
        mean, std = self.latent_mean.to(latents.device), self.latent_std.to(latents.device)
        for piece in latents.split(chunk, dim=2):
            frames = self._pixels(piece.float() * std + mean, past).clamp(-1, 1)
            if on_frames is not None:
                on_frames(frames)
            yield frames

    def _moments(self, frames: Tensor, past: Past | None) -> Tensor:
        x = frames.to(self.conv1.weight)
        if self.patch > 1:
            x = rearrange(x, "b c f (h i) (w j) -> b (c j i) f h w", i=self.patch, j=self.patch)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return self.conv1(self.encoder(x, past)).float()

    def _pixels(self, latents: Tensor, past: Past | None) -> Tensor:
        x = latents.to(self.conv2.weight).contiguous(memory_format=torch.channels_last_3d)
        x = self.decoder(self.conv2(x), past)
        if self.patch > 1:
            x = rearrange(x, "b (c j i) f h w -> b c f (h i) (w j)", i=self.patch, j=self.patch)
        return x.float()

    def _statistic(self, name: str, device: torch.device) -> Tensor:
        return torch.tensor(self.config[name], dtype=torch.float32, device=device).view(-1, 1, 1, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VideoVAE":
        # follow the device only: in bf16 the latents would be off by up to 0.4 %
        super()._apply(fn, recurse)
        for name in ("latent_mean", "latent_std"):
            setattr(self, name, self._statistic(name, getattr(self, name).device))
        return self


def _chunk_size(chunk: int | None, length: int) -> int:
    if chunk is None:
        return length
    if chunk < 1:
        raise UserError(
            f"got chunk={chunk}; use at least 1 latent frame at a time, or none for the whole clip"
        )
    return chunk


def _join(pieces: Iterable[Tensor], length: int) -> Tensor:
    """Pieces (B, C, f, H, W) in order -> (B, C, length, H, W), allocated once; a lone piece is returned."""
    start = 0
    for piece in pieces:
        if piece.shape[2] == length:
            return piece
        if start == 0:
            whole = piece.new_empty((*piece.shape[:2], length, *piece.shape[3:]))
        whole[:, :, start : start + piece.shape[2]] = piece
        start += piece.shape[2]
    assert start == length, f"pieces hold {start} of {length} frames"
    return whole


def _check_sizes(
    latent_channels: int,
    multipliers: Sequence[int],
    temporal: Sequence[bool],
    statistics: tuple[Sequence[float], Sequence[float]],
) -> None:
    if len(temporal) != len(multipliers) - 1:
        raise UserError(
            f"got {len(temporal)} temporal flags for {len(multipliers)} multipliers; "
            f"give one for each of the {len(multipliers) - 1} downsamplings"
        )
    for values in statistics:
        if len(values) != latent_channels:
            raise UserError(
                f"got {len(values)} latent means or stds; give one for each of {latent_channels} channels"
            )
