"""What a block computes around its linear layers, in 8 bits where these are.

A block calls the same functions whatever its layers are: what a layer in 8 bits reads is quantised when it is
made, and such a layer finishes what its outputs are for.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kernels.int8_linear import Tokens, int8_linears
from kernels.norms import add_gated, norm_modulate, norm_modulate_fp8, norm_modulate_int8
from turbodiffusion.models.int8 import Fp8Linear, Int8Linear
from turbodiffusion.models.layers import LayerNorm

# width up to which the last tiles of one layer leave much of a GPU idle; of wider ones, one product would
# save nothing, and keep the outputs of all in memory together
JOINED = 2048
PARTS = ("weight", "scale", "bias")  # of a layer
# norm_modulate to the numbers that layers of a kind read
QUANTISED = {Int8Linear: norm_modulate_int8, Fp8Linear: norm_modulate_fp8}


def modulated(x: Tensor, shift: Tensor, scale: Tensor, *readers: nn.Module) -> Tensor | Tokens:
    """norm_modulate for the layers that read it: in 8 bits, once, if all of them are, of one kind."""
    quantised = _quantised_for(readers)
    if quantised is None:
        return norm_modulate(x, shift, scale)
    return Tokens(*quantised(x, shift, scale), x.dtype)


def normed(x: Tensor, norm: LayerNorm, reader: nn.Module) -> Tensor | Tokens:
    """norm(x), whose eps is the kernels', for the layer that reads it: in 8 bits if that is."""
    if _quantised_for([reader]) is None:
        return norm(x)
    bias, weight = (parameter.float().view(1, 1, -1) for parameter in (norm.bias, norm.weight))
    return modulated(x, bias, weight - 1, reader)


def join(*layers: nn.Module) -> None:
    """Move weights of layers of one size one under another, for `projected`, if they are small and in 8 bits.

    To be called where weights have come to stay; while a graph is recorded, they would move at every replay.
    """
    if _are_int8(layers) and layers[0].weight.shape[1] <= JOINED:
        for name in PARTS:
            tensors = [getattr(layer, name) for layer in layers]
            if tensors[0] is not None and _together(tensors) is None:
                for tensor, part in zip(tensors, torch.cat(tensors).chunk(len(tensors)), strict=True):
                    tensor.data = part  # the same tensor, which others may hold


def projected(x: Tensor | Tokens, *layers: nn.Module) -> Sequence[Tensor]:
    """What each of some layers of one size makes of x: by one product if they were joined."""
    if _are_int8(layers):
        return _projected(x, layers)
    return [layer(x) for layer in layers]


def add_projected(x: Tensor, y: Tensor | Tokens, layer: nn.Module, gate: Tensor | None = None) -> Tensor:
    """x + gate layer(y), finished by the layer if it is in 8 bits.  x (B, L, E), gate (B or 1, L or 1, E)."""
    if _are_int8([layer]):
        return layer(y, add=x, gate=gate)
    return x + layer(y) if gate is None else add_gated(x, layer(y), gate)


def _quantised_for(readers: Sequence[nn.Module]) -> Callable[..., tuple[Tensor, Tensor]] | None:
    kinds = {type(reader) for reader in readers}
    return QUANTISED.get(kinds.pop()) if len(kinds) == 1 else None


def _are_int8(layers: Sequence[nn.Module]) -> bool:
    return all(isinstance(layer, Int8Linear) for layer in layers)


@torch.compiler.disable
def _projected(x: Tensor | Tokens, layers: Sequence[Int8Linear]) -> Sequence[Tensor]:
    weight, scale, bias = (_together([getattr(layer, name) for layer in layers]) for name in PARTS)
    if weight is None or scale is None:
        return [layer(x) for layer in layers]
    return int8_linears(x, weight, scale, bias, len(layers))


def _together(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Tensors of one shape as the one whose parts they are, or None where they are not."""
    first = tensors[0]
    if first is None:
        return None
    places = {
        (t.untyped_storage().data_ptr(), t.storage_offset() - i * t.numel()) for i, t in enumerate(tensors)
    }
    if len(places) > 1:
        return None
    return first.as_strided((len(tensors) * len(first), *first.shape[1:]), first.stride())
