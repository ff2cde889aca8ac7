"""Linear layers in e4m3: the twin on a CPU, PyTorch's kernel on a GPU that has it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fp8_linear import E4M3, Trial, fp8_linear, library, quantise_plainly, quantise_rows, twin
from kernels.int8_linear import Tokens, quantise_tokens
from tests.kernels.judging import DEVICE

ON_GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no e4m3 on this GPU"
)


def spacing(x: Tensor) -> Tensor:
    """Between neighbours in e4m3 around a row's numbers, fp64: 3 bits after the first, none below 2^-9."""
    step = x.double().abs().amax(-1, keepdim=True) / 448
    exponent = torch.frexp((x / step).abs()).exponent - 1
    return step * 2.0 ** (exponent.clamp(min=-6) - 3)


def test_noise_is_that_of_two_roundings() -> None:
    x, weight, bias = torch.randn(64, 1536), torch.randn(256, 1536), torch.randn(256)
    truth = F.linear(x.double(), weight.double(), bias.double())
    off = fp8_linear(x, *quantise_rows(weight), bias) - truth
    # rounding between neighbours adds a variance of their distance squared / 12, and each number meets those
    # of the other matrix's rows that are in its place; the two add up
    variance = spacing(x).square() @ weight.double().square().mT
    variance += x.double().square() @ spacing(weight).square().mT
    expected = 20 * math.log10(truth.norm()) - 10 * math.log10(variance.sum() / 12)
    got = 20 * math.log10(truth.norm() / off.norm())
    # of 16,384 outputs known to 0.05 dB, thrice
    assert abs(got - expected) < 0.15


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_numbers_of_e4m3_are_exact_whatever_their_row_is_measured_in(size: float) -> None:
    every = torch.arange(256).to(torch.uint8).view(E4M3).float()
    x = every[every.isfinite()].repeat(3, 1)
    got, step = quantise_rows(x * torch.tensor([size, 1.0, 2.0]).unsqueeze(1))
    assert torch.equal(got.float(), x)
    # a product and a reciprocal, each a rounding off
    torch.testing.assert_close(step, torch.tensor([size, 1.0, 2.0]), rtol=2**-22, atol=0)


def test_products_are_those_of_fp64() -> None:
    x, weight, bias = (
        quantise_rows(torch.randn(33, 900)),
        quantise_rows(torch.randn(70, 900)),
        torch.randn(70),
    )
    numbers = [part.double() * step.double().unsqueeze(1) for part, step in (x, weight)]
    truth = F.linear(*numbers, bias.double())
    # products of two e4m3 numbers are exact in fp32; their sums, of 900, lose less than 900 roundings of what
    # they would be without signs
    allowed = 900 * 2**-24 * F.linear(*(part.abs() for part in numbers), bias.double().abs())
    assert ((twin(*x, *weight, bias) - truth).abs() <= allowed).all()


def test_any_axes_any_float_and_gelu() -> None:
    x, (weight, step) = torch.randn(2, 3, 48).bfloat16(), quantise_rows(torch.randn(20, 48))
    got = fp8_linear(x, weight, step)
    assert (got.shape, got.dtype) == ((2, 3, 20), torch.bfloat16)
    assert torch.equal(
        got.flatten(0, 1), twin(*quantise_rows(x.flatten(0, 1)), weight, step, None).bfloat16()
    )
    assert torch.equal(fp8_linear(x, weight, step, gelu=True), F.gelu(got, approximate="tanh"))


def test_tokens_quantised_before_are_the_same() -> None:
    x, layer = torch.randn(2, 3, 48).bfloat16(), quantise_rows(torch.randn(20, 48))
    tokens = Tokens(*quantise_rows(x), x.dtype)
    assert torch.equal(fp8_linear(tokens, *layer), fp8_linear(x, *layer))
    with pytest.raises(ValueError, match=r"torch\.bfloat16 in torch\.int8"):
        fp8_linear(quantise_tokens(x), *layer)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_give_nan_and_no_other_does(bad: float) -> None:
    x, weight = torch.randn(5, 48, device=DEVICE), torch.randn(16, 48, device=DEVICE)
    x[2, 7] = bad
    y = fp8_linear(x, *quantise_rows(weight))
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4]].isfinite().all()


def test_a_row_of_zeros_is_the_bias() -> None:
    bias = torch.randn(8)
    assert torch.equal(fp8_linear(torch.zeros(1, 24), *quantise_rows(torch.randn(8, 24)), bias), bias[None])


def test_arguments_that_do_not_fit_are_refused() -> None:
    weight, step = quantise_rows(torch.randn(8, 24))
    with pytest.raises(ValueError, match="wanted"):
        fp8_linear(torch.randn(2, 23), weight, step)
    with pytest.raises(ValueError, match="wanted"):
        fp8_linear(torch.randn(2, 24), weight, step[:-1])
    with pytest.raises(ValueError, match=r"wanted floats in torch\.float8_e4m3fn, torch\.float8_e4m3fn"):
        fp8_linear(torch.randn(2, 24), weight.float(), step)
    with pytest.raises(ValueError, match=r"torch\.bfloat16; wanted"):
        fp8_linear(torch.randn(2, 24), weight, step.bfloat16())
    with pytest.raises(ValueError, match="no derivatives"):
        fp8_linear(torch.randn(2, 24, requires_grad=True), weight, step)


def test_the_trial_tells_right_from_wrong() -> None:
    trial = Trial(torch.device("cpu"))
    assert trial.share(twin) < 1

    def one_tile_less(*layer: Tensor) -> Tensor:
        y = twin(*layer)
        y[:128, :128] = 0
        return y

    assert trial.share(one_tile_less) > 1


@ON_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 16, 16), (65, 1536, 8960), (4101, 8960, 1536), (4101, 13824, 5120)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_pytorchs_products_are_the_twins(shape: tuple[int, int, int], has_bias: bool) -> None:
    M, K, N = shape
    x, weight = (quantise_rows(torch.randn(rows, K, device="cuda").bfloat16()) for rows in (M, N))
    bias = torch.randn(N, device="cuda").bfloat16() if has_bias else None
    truth = twin(*x, *weight, bias)
    got = library(*x, *weight, bias)
    assert got.dtype == torch.bfloat16
    # a rounding to bf16, 2^-8 / sqrt(12) of a number's binade, and Hopper's sums: K / 32 additions, each cut
    # to 14 bits of what the largest product is
    assert (got - truth).norm() < 5e-3 * truth.norm()


@ON_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_on_a_gpu_are_the_twins(dtype: torch.dtype) -> None:
    x = torch.randn(2, 4099, 8960, device="cuda").to(dtype)
    assert all(map(torch.equal, quantise_rows(x), quantise_plainly(x)))


@ON_GPU
@pytest.mark.gpu
def test_layers_on_a_gpu_use_it() -> None:
    x = torch.randn(2, 70, 1536, device="cuda").bfloat16()
    eight, bias = quantise_rows(torch.randn(1536, 1536, device="cuda")), torch.randn(1536, device="cuda")
    got = fp8_linear(x, *eight, bias.bfloat16())
    assert torch.equal(got.flatten(0, 1), library(*quantise_rows(x.flatten(0, 1)), *eight, bias))
