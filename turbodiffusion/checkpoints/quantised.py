"""8-bit weights of linear layers in checkpoints: which there are, to floats and from floats, one at a time.

int8, fp8: ours, which networks run: a scale for each output channel, as `X.weight`, int8 or e4m3, with
`X.scale` (out,).
tiles: that of published `-quant` files: a scale for each 128 x 128 tile, as `X.int8_weight` with `X.scale` or
as int8 `X.weight` with `X.weight_scale_inv`.
"""

import math
from collections.abc import Callable, Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from turbodiffusion.checkpoints.keys import is_projection
from turbodiffusion.checkpoints.sources import Entries, Entry
from turbodiffusion.errors import UserError
from turbodiffusion.models.int8 import LINEARS

Quantise = Callable[[Tensor], tuple[Tensor, Tensor]]

TILE = 128
NONE, INT8, FP8, TILES = "none", *LINEARS, "tiles"
QUANTS = (NONE, *LINEARS, "auto")  # what may be asked of a network
# what has a scale for each output channel -> its scheme
BY_CHANNEL = {torch.int8: INT8, torch.float8_e4m3fn: FP8}


def quantise_tiles(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, in) -> int8 of the same shape, scales (ceil(out / 128), ceil(in / 128)) fp32.

    As published: of bf16 numbers, in 128ths of a tile's largest, which, where positive, saturates at 127.
    """
    rows, columns = weight.shape
    whole = F.pad(weight.bfloat16().float(), (0, -columns % TILE, 0, -rows % TILE))
    tiles = whole.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE))
    largest = tiles.abs().amax((1, 3), keepdim=True).clamp(min=1e-8)
    integers = (tiles * (128 / largest)).round_().clamp_(-128, 127).to(torch.int8)
    return integers.view(whole.shape)[:rows, :columns].contiguous(), largest[:, 0, :, 0] / 128


# the leaf that gives a pair away -> numbers and scales
_PARTS = {
    "scale": ("weight", "scale"),
    "int8_weight": ("int8_weight", "scale"),
    "weight_scale_inv": ("weight", "weight_scale_inv"),
}
# a scheme's name for the numbers, their dtype, and what makes them
_SCHEMES = {scheme: ("weight", dtype, LINEARS[scheme].quantise) for dtype, scheme in BY_CHANNEL.items()}
_SCHEMES[TILES] = ("int8_weight", torch.int8, quantise_tiles)


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """weight (out, in) in 8 bits times the scale of its channel (out,) or of its tile -> fp32 (out, in)."""
    if scale.ndim == 1:
        return weight.float() * scale.float().unsqueeze(1)
    rows, columns = weight.shape
    full = scale.float().repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
    return full.mul_(weight)


def linear_layers(floats: Entries) -> dict[str, int]:
    """The linear layers of a network's blocks -> how many weights each has."""
    return {
        name.removesuffix(".weight"): math.prod(entry.shape)
        for name, entry in floats.items()
        if name.startswith("blocks.") and name.endswith(".weight") and len(entry.shape) == 2
        if not is_projection(name)
    }


def stored_layers(entries: Entries) -> dict[str, str]:
    """The layers whose weights are stored in 8 bits -> their scheme.  UserError for a pair that is none."""
    return {
        layer: BY_CHANNEL[entries[numbers].dtype] if len(entries[scale].shape) == 1 else TILES
        for layer, numbers, scale in _pairs(entries)
    }


def settled(asked: str, stored: dict[str, str]) -> str:
    """none, int8 or fp8: how a network runs whose file stores these layers in 8 bits; auto: as its file does.

    Tiles, which have no kernel here, count as none.  Raises UserError for what is none of QUANTS.
    """
    if asked not in QUANTS:
        raise UserError(f"quant={asked}: choose {', '.join(QUANTS[:-1])} or {QUANTS[-1]}")
    if asked != "auto":
        return asked
    schemes = set(stored.values())
    return schemes.pop() if len(schemes) == 1 and schemes <= LINEARS.keys() else NONE


def dequantised(entries: Entries, dtype: torch.dtype) -> Entries:
    """The same tensors with every pair of numbers and scales replaced by one `.weight` in `dtype`.

    Raises UserError for one without the other and for scales that do not match.
    """
    plain = dict(entries)
    for layer, *names in _pairs(entries):
        weight, scale = (plain.pop(name) for name in names)
        plain[f"{layer}.weight"] = _product(weight, scale, dtype)
    return plain


def quantised(floats: Entries, layers: Collection[str], scheme: str) -> Entries:
    """The same tensors with the weight of every one of the layers in 8 bits."""
    eight = dict(floats)
    for layer in layers:
        eight |= EightBits(layer, eight.pop(f"{layer}.weight"), scheme).entries()
    return eight


class EightBits:
    """A layer's weight in a scheme of 8 bits: its numbers made anew whenever asked for, its scales once.

    quantise: weight (out, in) -> numbers and scales, otherwise to the nearest.
    """

    def __init__(self, layer: str, weight: Entry, scheme: str, quantise: Quantise | None = None):
        self.layer, self.weight, self.scheme = layer, weight, scheme
        self.leaf, self.dtype, nearest = _SCHEMES[scheme]
        self.quantise = quantise or nearest
        rows, columns = weight.shape
        self.grid = (rows,) if scheme in LINEARS else (math.ceil(rows / TILE), math.ceil(columns / TILE))
        self._scale: Tensor | None = None

    def entries(self) -> Entries:
        """The numbers and their scales, under the scheme's names."""
        return {
            f"{self.layer}.{self.leaf}": Entry(self.weight.shape, self.dtype, self._load_numbers),
            f"{self.layer}.scale": Entry(self.grid, torch.float32, self._load_scale),
        }

    def decibels(self) -> float:
        """The weight over its rounding error (SQNR).  Raises UserError for one that is not finite."""
        exact = self.weight.load().float()
        signal = exact.norm().item()
        if not math.isfinite(signal):
            raise UserError(
                f"{self.layer} holds NaN or infinities, which have no 8-bit form: mend the checkpoint"
            )
        noise = (dequantise(self._load_numbers(), self._load_scale()) - exact).norm().item()
        return 20 * math.log10(signal / noise) if noise else math.inf

    def _load_numbers(self) -> Tensor:
        numbers, self._scale = self.quantise(self.weight.load())
        return numbers

    def _load_scale(self) -> Tensor:
        if self._scale is None:
            self._load_numbers()
        return self._scale


def _pairs(entries: Entries) -> Iterator[tuple[str, str, str]]:
    """Layer, name of the numbers, name of the scales; UserError for half a pair and for what is none."""
    for name in entries:
        layer, _, leaf = name.rpartition(".")
        if leaf not in _PARTS or (leaf == "scale" and f"{layer}.int8_weight" in entries):
            continue
        names = [f"{layer}.{part}" for part in _PARTS[leaf]]
        if missing := [part for part in names if part not in entries]:
            raise UserError(f"quantised layer {layer} has {leaf} but no {missing[0]}; its file is incomplete")
        weight, scale = (entries[part] for part in names)
        tiles = tuple(math.ceil(size / TILE) for size in weight.shape)
        wanted, each = (weight.shape[:1], "channel") if leaf == "scale" else (tiles, "128 x 128 tile")
        known = list(BY_CHANNEL) if leaf == "scale" else [torch.int8]
        if weight.dtype not in known or len(weight.shape) != 2 or scale.shape != wanted:
            raise UserError(
                f"quantised layer {layer} has {weight.dtype} weights {weight.shape} and scales "
                f"{scale.shape}; wanted {' or '.join(map(str, known))}, and a scale for each {each}, {wanted}"
            )
        yield layer, *names


def _product(weight: Entry, scale: Entry, dtype: torch.dtype) -> Entry:
    return Entry(weight.shape, dtype, lambda: dequantise(weight.load(), scale.load()).to(dtype))
