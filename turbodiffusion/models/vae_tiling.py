"""Encode and decode in overlapping tiles, so that memory depends on the tile and not on the picture.

Tiles are blended by weights that sum to one and are linear across each overlap. A tile differs from the same
place of the whole picture in what lies beyond its edge: attention sees nothing there, convolutions zeros.
"""

from collections.abc import Callable
from itertools import count, pairwise

import torch
from torch import Tensor

from turbodiffusion.errors import UserError
from turbodiffusion.models.vae import VideoVAE

Span = tuple[int, int]

TILE = (32, 32)
OVERLAP = 8


def decode_tiled(
    vae: VideoVAE,
    latents: Tensor,
    *,
    tile: tuple[int, int] = TILE,
    overlap: int = OVERLAP,
    chunk: int | None = 1,
) -> Tensor:
    """Normalised latents (B, C, T, h, w) -> frames (B, 3, F, H, W) in [-1, 1], fp32.

    tile (height, width) and overlap are in latent pixels, chunk is `VideoVAE.decode`'s. Raises UserError
    for an overlap of more than half a tile.
    """

    def decode(part: Tensor) -> Tensor:
        return vae.decode(part, chunk=chunk)

    return _by_tiles(decode, latents, tile=tile, overlap=overlap, scales=(1, vae.spatial_factor))


def encode_tiled(
    vae: VideoVAE,
    frames: Tensor,
    *,
    tile: tuple[int, int] = TILE,
    overlap: int = OVERLAP,
    chunk: int | None = 1,
) -> Tensor:
    """Frames (B, 3, F, H, W) in [-1, 1] -> normalised latents (B, C, T, h, w), fp32.

    tile, overlap (both in latent pixels), chunk and errors as in `decode_tiled`.
    """
    vae.check_frames(frames)

    def encode(part: Tensor) -> Tensor:
        return vae.encode(part, chunk=chunk)

    return _by_tiles(encode, frames, tile=tile, overlap=overlap, scales=(vae.spatial_factor, 1))


def decode_bytes(vae: VideoVAE, shape: tuple[int, int, int], *, chunk: int = 1) -> int:
    """Estimated peak of `VideoVAE.decode` for one clip of latents of shape (T, h, w), weights not counted."""
    length, height, width = shape
    frames = 1 + (length - 1) * vae.temporal_factor
    config, item = vae.config, vae.conv2.weight.element_size()
    widths = [config["decoder_base"] * m for m in config["multipliers"]]
    # every residual convolution remembers two frames; a level further in has a quarter of the pixels
    remembered = sum(2 * 2 * (config["res_blocks"] + 1) * w / 4**level for level, w in enumerate(widths))
    # measured: as many tensors of the narrowest width at full size, and two frames of history, at once.
    # Fused steps need about 4, not 5 (480p, 7 latent frames at a time: 10.4 GiB, plain ones 12.3).  No one
    # number is near both, and not every device has them: this is the larger one
    alive = (5 if config["patch"] == 1 else 7) * (2 + min(chunk, length) * vae.temporal_factor) * widths[0]
    pixels = height * width * vae.spatial_factor**2
    return round(pixels * (12 * frames + item * (remembered + alive) / config["patch"] ** 2))


def longest_chunk(vae: VideoVAE, shape: tuple[int, int, int]) -> int:
    """Latent frames of shape (B, h, w) in a piece whose largest tensor still counts its numbers in 32 bits.

    Of larger ones some libraries have no fast convolution, and others none.
    """
    config, (batch, height, width) = vae.config, shape
    # before the last upsampling's convolution: the second width at full size
    channels = config["decoder_base"] * max(config["multipliers"][:2])
    pixels = height * width * (vae.spatial_factor // vae.patch) ** 2
    return max(1, (2**31 - 1) // (batch * channels * pixels * vae.temporal_factor))


def _by_tiles(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tile: tuple[int, int],
    overlap: int,
    scales: tuple[int, int],
) -> Tensor:
    """Run on tiles of x and blend the results; scales: pixels of x and of the result in one latent pixel."""
    source, target = scales
    axes = [_spans(x.shape[axis] // source, side, overlap) for axis, side in zip((-2, -1), tile, strict=True)]
    rows, columns = axes
    if len(rows) == len(columns) == 1:
        return run(x)
    row_weights, column_weights = (_weights(spans, overlap, target) for spans in axes)
    whole: Tensor | None = None
    for (top, bottom), vertical in zip(rows, row_weights, strict=True):
        for (left, right), horizontal in zip(columns, column_weights, strict=True):
            part = run(x[..., top * source : bottom * source, left * source : right * source])
            if whole is None:
                whole = part.new_zeros(*part.shape[:-2], rows[-1][1] * target, columns[-1][1] * target)
            place = whole[..., top * target : bottom * target, left * target : right * target]
            place.addcmul_(part, (vertical[:, None] * horizontal).to(part.device))
    return whole


def _spans(length: int, tile: int, overlap: int) -> list[Span]:
    """The fewest (start, stop) that cover `length`, none longer than `tile`, neighbours sharing `overlap`."""
    if overlap < 0 or (length > tile < 2 * overlap) or tile < 1:
        raise UserError(f"got overlap={overlap} for tiles of {tile}; use 0 to {tile // 2}, or larger tiles")
    for pieces in count(1):
        edges = pairwise(i * length // pieces for i in range(pieces + 1))
        spans = [
            (max(0, start - overlap // 2), min(length, stop + overlap - overlap // 2))
            for start, stop in edges
        ]
        if max(stop - start for start, stop in spans) <= tile:
            break
    return spans


def _weights(spans: list[Span], overlap: int, scale: int) -> list[Tensor]:
    """Each span's weight at its pixels, `scale` of them to a latent pixel; all of a pixel's sum to one."""
    length = spans[-1][1]
    position = (torch.arange(length * scale) + 0.5) / scale
    ramps = torch.ones(len(spans), length * scale)
    for ramp, (start, stop) in zip(ramps, spans, strict=True):
        # no neighbour, no ramp; without overlap the ramps are steps, at infinite slope
        rise = (position - start) / overlap if start > 0 else ramp
        fall = (stop - position) / overlap if stop < length else ramp
        ramp.copy_(torch.minimum(rise, fall).clamp(0, 1))
    ramps /= ramps.sum(dim=0)
    return [ramp[start * scale : stop * scale] for ramp, (start, stop) in zip(ramps, spans, strict=True)]
