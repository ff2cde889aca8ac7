"""Outlying channels moved from what linear layers read to their weights (arXiv:2211.10438).

Channels are divided where they are made, by a norm, a linear layer or the signals of time, and weights are
multiplied: up to roundings a network computes what it did.  What leaves a GELU can not be divided so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from turbodiffusion.attention import DENSE
from turbodiffusion.checkpoints.metadata import Numbers
from turbodiffusion.checkpoints.sources import Entries, Entry

TIME = "time_projection.1"
# of the six signals of time, those that scale, of which the network adds 1 to
SCALES = (1, 4)
# a channel is divided by no more than 2 to it, nor multiplied
LARGEST = 8


@dataclass(frozen=True)
class Channels:
    """Channels of tokens: the linear layers that read them, and those, or norms, that make them.

    signal: the first of two signals of time that shift and scale them, if any.
    """

    readers: tuple[str, ...]
    makers: tuple[str, ...]
    signal: int | None = None


def divisible(config: Numbers) -> Iterator[Channels]:
    """What a network of this config lets be divided.  What all blocks share, all of them read."""
    count, has_image = config["layers"], config["clip_tokens"] > 0

    def named(*layers: str) -> tuple[str, ...]:
        return tuple(f"blocks.{block}.{layer}" for block in range(count) for layer in layers)

    yield Channels(named("self_attn.q", "self_attn.k", "self_attn.v"), (TIME,), signal=0)
    yield Channels(named("ffn.0"), (TIME,), signal=3)
    yield Channels(named("cross_attn.k", "cross_attn.v"), ("text_embedding.2",))
    if has_image:
        yield Channels(named("cross_attn.k_img", "cross_attn.v_img"), ("img_emb.proj.4",))
    for block in (f"blocks.{i}" for i in range(count)):
        yield Channels((f"{block}.cross_attn.q",), (f"{block}.norm3",))
        values = ("v", "v_img") if has_image else ("v",)
        yield Channels((f"{block}.cross_attn.o",), tuple(f"{block}.cross_attn.{v}" for v in values))
        # the linear branch of sparse attention mixes channels
        if config["attention"]["name"] == DENSE["name"]:
            yield Channels((f"{block}.self_attn.o",), (f"{block}.self_attn.v",))


class Smoothing:
    """Numbers of a network's tensors, by their names, after channels are divided.

    largest: of what each linear layer reads, by channel.  strength: 0 leaves weights alike, 1 activations.
    """

    def __init__(self, config: Numbers, floats: Entries, largest: Mapping[str, Tensor], strength: float):
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        self.signals = torch.ones(6, config["dim"], dtype=torch.float64)
        for channels in divisible(config):
            read = torch.stack([largest[layer].float().cpu() for layer in channels.readers]).amax(0)
            weights = [floats[f"{layer}.weight"].load().float().abs().amax(0) for layer in channels.readers]
            self._divide(channels, divisors(read, torch.stack(weights).amax(0), strength))
        self.rows |= dict.fromkeys((f"{TIME}.weight", f"{TIME}.bias"), self.signals.flatten())

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor of that name, in its dtype; modulation in fp32 at least."""
        if _is_modulation(name):
            added = torch.zeros(6, 1)
            added[list(SCALES)] = 1
            added, signals = added.to(tensor.device), self.signals.to(tensor.device)
            return ((tensor.double() + added) / signals - added).to(_modulation_dtype(tensor.dtype))
        if name in self.columns:
            tensor = (tensor * self.columns[name].to(tensor.device)).to(tensor.dtype)
        if name in self.rows:
            by = self.rows[name].to(tensor.device).view(-1, *[1] * (tensor.ndim - 1))
            tensor = (tensor / by).to(tensor.dtype)
        return tensor

    def entries(self, entries: Entries) -> Entries:
        """The tensors, each changed when it is read."""
        return {name: self._changed(name, entry) for name, entry in entries.items()}

    def _divide(self, channels: Channels, by: Tensor) -> None:
        self.columns |= {f"{layer}.weight": by for layer in channels.readers}
        if channels.signal is not None:
            self.signals[channels.signal : channels.signal + 2] = by
        else:
            self.rows |= {f"{maker}.{leaf}": by for maker in channels.makers for leaf in ("weight", "bias")}

    def _changed(self, name: str, entry: Entry) -> Entry:
        dtype = _modulation_dtype(entry.dtype) if _is_modulation(name) else entry.dtype
        return replace(entry, dtype=dtype, load=lambda: self(name, entry.load()).to(dtype))


def divisors(read: Tensor, weights: Tensor, strength: float) -> Tensor:
    """read^strength / weights^(1 - strength), of largest numbers by channel; 1 in the geometric mean."""
    read, weights = (x.clamp(min=1e-5 * x.max()).double().log2() for x in (read, weights))
    exponents = strength * read - (1 - strength) * weights
    return 2 ** (exponents - exponents.mean()).clamp(-LARGEST, LARGEST)


def _is_modulation(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith(".modulation")


def _modulation_dtype(stored: torch.dtype) -> torch.dtype:
    return torch.promote_types(stored, torch.float32)
