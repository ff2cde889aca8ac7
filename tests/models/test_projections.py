"""What a block computes around its linear layers, on a CPU: in floats what it says, in 8 bits the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.int8_linear import Tokens, quantise_tokens
from kernels.norms import add_gated, norm_modulate
from turbodiffusion.models.int8 import LINEARS
from turbodiffusion.models.layers import LayerNorm
from turbodiffusion.models.projections import add_projected, join, modulated, normed, projected

B, L, E = 2, 5, 24


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


def layers(count: int, quant: str | None) -> list[nn.Module]:
    floats = [nn.Linear(E, E).requires_grad_(False) for _ in range(count)]
    return [LINEARS[quant].from_linear(layer) for layer in floats] if quant else floats


def test_floats_are_the_separate_steps() -> None:
    x, y, shift, gate = draw(B, L, E), draw(B, L, E), draw(B, 1, E), draw(B, 1, E)
    several, norm = layers(3, None), LayerNorm(E, eps=1e-6)
    assert torch.equal(modulated(x, shift, gate, *several), norm_modulate(x, shift, gate))
    assert torch.equal(normed(x, norm, several[0]), norm(x))
    assert all(torch.equal(got, layer(x)) for got, layer in zip(projected(x, *several), several, strict=True))
    assert torch.equal(add_projected(x, y, several[0], gate), add_gated(x, several[0](y), gate))
    assert torch.equal(add_projected(x, y, several[0]), x + several[0](y))


@pytest.mark.parametrize("quant", LINEARS)
@pytest.mark.parametrize("tokens", [1, L])
def test_8_bit_tokens_are_the_quantised_norm(tokens: int, quant: str) -> None:
    x, shift, scale = draw(B, L, E), draw(B, tokens, E), draw(B, tokens, E)
    several = layers(3, quant)
    got, floats = modulated(x, shift, scale, *several), norm_modulate(x, shift, scale)
    counts, steps = several[0].quantise(floats.flatten(0, 1))
    assert torch.equal(got.counts.flatten(0, 1), counts)
    assert torch.equal(got.steps.flatten(), steps)
    # in fp32 nothing is rounded in between: what is quantised once is what each layer makes of the floats
    assert all(map(torch.equal, projected(got, *several), (layer(floats) for layer in several)))


def test_an_affine_norm_is_quantised() -> None:
    x, norm = draw(B, L, E), LayerNorm(E, eps=1e-6).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    got = normed(x, norm, layers(1, "int8")[0])
    # half a step, beside a few roundings of numbers that are at most 127 steps
    off = (got.counts * got.steps.unsqueeze(-1) - F.layer_norm(x, (E,), norm.weight, norm.bias, 1e-6)).abs()
    assert (off <= got.steps.unsqueeze(-1) * (0.5 + 127 * 8 * 2**-24)).all()


@pytest.mark.parametrize("other", [None, "fp8"])
def test_tokens_stay_floats_for_layers_of_two_kinds(other: str | None) -> None:
    x, shift, scale = draw(B, L, E), draw(B, 1, E), draw(B, 1, E)
    mixed = [*layers(2, "int8"), *layers(1, other)]
    h = modulated(x, shift, scale, *mixed)
    assert isinstance(h, Tensor)
    assert all(torch.equal(got, layer(h)) for got, layer in zip(projected(h, *mixed), mixed, strict=True))


@pytest.mark.parametrize("is_quantised", [True, False])
def test_one_product_is_the_layers_one_by_one(is_quantised: bool) -> None:
    x, several = draw(B, L, E), layers(3, "int8")
    x = quantise_tokens(x) if is_quantised else x
    wanted = [layer(x) for layer in several]
    for _ in range(2):
        got = projected(x, *several)
        assert all(map(torch.equal, got, wanted))
        join(*several)


@pytest.mark.parametrize("tokens", [1, L])
def test_gated_sums_are_finished_by_the_layer(tokens: int) -> None:
    x, y, gate, (layer,) = draw(B, L, E), draw(B, L, E), draw(B, tokens, E), layers(1, "int8")
    assert torch.equal(add_projected(x, y, layer, gate), x + gate * layer(y))
    assert torch.equal(add_projected(x, y, layer), x + layer(y))


def test_weights_that_are_moved_together_are_the_same_tensors_of_the_same_numbers() -> None:
    x, several = draw(B, L, E), layers(3, "int8")
    before = [layer.weight for layer in several]
    numbers = [layer.weight.clone() for layer in several]
    projected(x, *several)
    # not by a call, which may be recorded and repeated
    assert len({tensor.untyped_storage().data_ptr() for tensor in before}) == 3
    join(*several)
    joined = several[0].weight.untyped_storage().data_ptr()
    for layer, tensor, wanted in zip(several, before, numbers, strict=True):
        assert layer.weight is tensor
        assert torch.equal(tensor, wanted)
        assert tensor.untyped_storage().data_ptr() == joined
    # sent somewhere else, as by an offload, and asked again
    several[1].weight.data = several[1].weight.clone()
    assert all(map(torch.equal, projected(x, *several), (layer(x) for layer in several)))


def test_quantised_tokens_keep_their_dtype() -> None:
    x, (layer,) = draw(B, L, E).bfloat16(), layers(1, "int8")
    assert isinstance(quantise_tokens(x), Tokens)
    assert layer(quantise_tokens(x)).dtype == torch.bfloat16
