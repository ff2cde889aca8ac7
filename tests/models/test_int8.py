"""8-bit linear layers of a Wan transformer, on a CPU."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.int8_linear import int8_linear, quantise_rows
from turbodiffusion.models.int8 import LINEARS, Int8Linear, to_eight_bits
from turbodiffusion.models.wan import WanModel

SIZES = {"dim": 48, "ffn_dim": 80, "heads": 2, "layers": 2, "text_dim": 20, "text_length": 16, "freq_dim": 32}
CLIP = {"in_channels": 36, "clip_tokens": 257}
SLA = {"attention": {"name": "sla", "ratio": 0.5, "block_q": 32, "block_k": 32}}


def random_model(**options: object) -> WanModel:
    model = WanModel(**SIZES, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            # every bias, norm and modulation away from its neutral initial value, and the head from zero
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@torch.no_grad()
def velocity(model: WanModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = model.patch_embedding.weight.dtype
    x, context = (torch.randn(size, generator=generator) for size in ((2, 16, 3, 8, 8), (2, 7, 20)))
    return model(x.to(dtype), torch.tensor([300.0, 900.0]), context.to(dtype))


def decibels(signal: Tensor, noise: Tensor) -> float:
    return 20 * math.log10(signal.norm() / noise.norm())


def test_noise_is_that_of_two_roundings() -> None:
    x, weight, bias = torch.randn(64, 1536), torch.randn(256, 1536), torch.randn(256)
    truth = F.linear(x.double(), weight.double(), bias.double())
    got = int8_linear(x, *quantise_rows(weight), bias)
    # rounding to a step adds a variance of its square / 12 to a number, and each number meets all of the
    # other matrix's rows; the two add up
    (_, x_step), (_, w_step) = quantise_rows(x), quantise_rows(weight)
    noise = x_step.norm() ** 2 * weight.norm() ** 2 + w_step.norm() ** 2 * x.norm() ** 2
    expected = 10 * math.log10(truth.norm() ** 2 / (noise / 12))
    # the noise of 16,384 outputs is known to 1 / sqrt(16384 / 2), or 0.05 dB: three of those
    assert abs(decibels(truth, got - truth) - expected) < 0.15
    # a relative error of 1.2e-2 of Gaussian numbers, whose rows of 1536 end near 3.5 deviations:
    # sqrt(2 / 12) * 3.5 / 127
    assert decibels(truth, got - truth) > -20 * math.log10(1.2e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_numbers_of_a_grid_are_exact(bias: bool) -> None:
    # a largest of 127 in every row makes steps of 1, or a rounding off
    linear = nn.Linear(24, 8, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-126, 127, (8, 24)))
        linear.weight[:, 0] = 127
        x = torch.randint(-126, 127, (2, 3, 24)).float()
        x[..., 1] = -127
        wanted = linear(x)
        got = Int8Linear.from_linear(linear)(x)
    # two steps and a product of them, each a rounding off
    torch.testing.assert_close(got, wanted, rtol=0, atol=8 * 2**-24 * (127 * 127 * 24))
    assert got.shape == (2, 3, 8)


def test_gelu_is_what_it_would_be_after_the_layer() -> None:
    layer = Int8Linear.from_linear(nn.Linear(24, 8))
    fused = Int8Linear(layer.weight, layer.scale, layer.bias, gelu=True)
    x = torch.randn(5, 24)
    assert torch.equal(fused(x), F.gelu(layer(x), approximate="tanh"))


@pytest.mark.parametrize(("options", "quant"), [({}, "int8"), (CLIP, "int8"), (SLA, "fp8")])
def test_linear_layers_of_blocks_and_no_others_are_swapped(options: dict[str, object], quant: str) -> None:
    model = random_model(**options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = ["cross_attn.k_img", "cross_attn.v_img"] if "clip_tokens" in options else []
    attention = [f"{kind}.{x}" for kind in ("self_attn", "cross_attn") for x in "qkvo"]
    layers = {f"blocks.{i}.{name}" for i in range(2) for name in (*attention, *images, "ffn.0", "ffn.2")}
    assert set(to_eight_bits(model, quant=quant)) == layers
    kinds = {type(model.get_submodule(name)) for name in layers}
    assert kinds == {LINEARS[quant]}
    after = model.state_dict()
    changed = {f"{name}.weight" for name in layers}
    assert after.keys() - before.keys() == {f"{name}.scale" for name in layers}
    assert before.keys() <= after.keys()
    assert {name for name, tensor in after.items() if tensor.dtype.itemsize == 1} == changed
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name not in changed)


@pytest.mark.parametrize("quant", LINEARS)
def test_state_loads_strictly_into_a_swapped_empty_network(quant: str) -> None:
    model = random_model()
    to_eight_bits(model, quant=quant)
    with torch.device("meta"):
        empty = WanModel(**SIZES)
    to_eight_bits(empty, quant=quant)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()}
    assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    empty.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert torch.equal(velocity(empty), velocity(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quant", "layer_error"), [("int8", 1e-2), ("fp8", 3.8e-2)])
def test_network_is_nearly_what_it_was(quant: str, layer_error: float, dtype: torch.dtype) -> None:
    model = random_model().to(dtype)
    truth = velocity(model)
    to_eight_bits(model, quant=quant)
    off = (velocity(model) - truth).norm() / truth.norm()
    # int8: rows of 48 or 80 end at 2.5 deviations; fp8: spacings of an 8th to a 16th, over sqrt(12), of two
    # numbers.  20 layers in two blocks, on branches of the stream whose errors are independent: sqrt(20)
    # times that in all; and no less than a share of one layer's
    assert 0.1 * layer_error < off < 20**0.5 * layer_error


def test_scales_of_less_precision_are_refused() -> None:
    layer = Int8Linear.from_linear(nn.Linear(24, 8)).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"weight_step in torch\.bfloat16"):
        layer(torch.randn(2, 24))


def test_derivatives_are_refused() -> None:
    layer = Int8Linear.from_linear(nn.Linear(24, 8))
    with pytest.raises(ValueError, match="no derivatives"):
        layer(torch.randn(2, 24, requires_grad=True))


def test_arguments_that_do_not_fit_are_refused() -> None:
    weight, step = quantise_rows(torch.randn(8, 24))
    with pytest.raises(ValueError, match="wanted"):
        int8_linear(torch.randn(2, 23), weight, step)
    with pytest.raises(ValueError, match="wanted"):
        int8_linear(torch.randn(2, 24), weight, step[:-1])
    with pytest.raises(ValueError, match=r"wanted torch\.int8"):
        int8_linear(torch.randn(2, 24), weight.float(), step)
    with pytest.raises(ValueError, match=r"torch\.float64"):
        int8_linear(torch.randn(2, 24, dtype=torch.float64), weight, step)
