"""INT8 weights in 128 x 128 tiles, as `-quant` checkpoints hold them, back to floats one tensor at a time."""

import math

import torch
from torch import Tensor

from turbodiffusion.checkpoints.sources import Entries, Entry
from turbodiffusion.errors import UserError

TILE = 128


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """weight (out, in) int8 times its tile's scale (ceil(out / 128), ceil(in / 128)) -> fp32 (out, in)."""
    rows, columns = weight.shape
    full = scale.float().repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
    return full.mul_(weight)


def dequantised(entries: Entries, dtype: torch.dtype) -> Entries:
    """The same tensors with every pair of integers and scales replaced by one `.weight` in `dtype`.

    Pairs are `X.int8_weight` with `X.scale`, or an int8 `X.weight` with `X.weight_scale_inv`.  Raises
    UserError for one without the other and for scales that do not match the tiles.
    """
    plain = dict(entries)
    for name in entries:
        layer, _, leaf = name.rpartition(".")
        partner = {"int8_weight": "scale", "weight_scale_inv": "weight"}.get(leaf)
        if partner is None:
            continue
        if f"{layer}.{partner}" not in entries:
            raise UserError(f"quantised layer {layer} has {leaf} but no {partner}; its file is incomplete")
        one, other = plain.pop(name), plain.pop(f"{layer}.{partner}")
        weight, scale = (one, other) if leaf == "int8_weight" else (other, one)
        plain[f"{layer}.weight"] = _pair(layer, weight, scale, dtype)
    return plain


def _pair(layer: str, weight: Entry, scale: Entry, dtype: torch.dtype) -> Entry:
    tiles = tuple(math.ceil(size / TILE) for size in weight.shape)
    if weight.dtype != torch.int8 or len(tiles) != 2 or scale.shape != tiles:
        raise UserError(
            f"quantised layer {layer} has {weight.dtype} weights {weight.shape} and scales {scale.shape}; "
            f"wanted int8 and one scale for each 128 x 128 tile, {tiles}"
        )
    return Entry(weight.shape, dtype, lambda: dequantise(weight.load(), scale.load()).to(dtype))
