"""The Triton kernels of 8-bit linear layers: on a GPU, or in the interpreter by test_without_gpu.py."""

from itertools import product

import pytest
import torch
from torch import Tensor

from kernels import int8_linear_triton as kernels
from kernels import reference_int8, rows_triton
from kernels.fp8_linear import E4M3, has_e4m3, quantise_plainly
from kernels.int8_linear import (
    Trial,
    int8_linear,
    int8_linears,
    int8_product,
    quantise_rows,
    quantise_tokens,
)
from kernels.int8_linear_triton import Finish
from tests.kernels.judging import DEVICE, GPU

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CAPABILITY = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1] if GPU else 0
# M, K, N: one token, less than a tile and one more than half of it; depths and columns with ragged ends
SMALL = [(1, 16, 8), (63, 176, 72), (65, 80, 130), (130, 48, 33)]
# widths of Wan, of tiles that end inside, and of no multiple of anything
WIDTHS = [(1536, 1536), (1536, 8960), (8960, 1536), (5120, 5120), (5120, 13824), (13824, 5120), (1541, 999)]
LARGE = [(M, K, N) for (K, N), M in product(WIDTHS, (1, 65, 4101))] + [(32760, 1536, 8960)]
CASES = [*SMALL, *LARGE] if GPU else SMALL
NUMBERS = {torch.int8: reference_int8.quantise_rows}
NUMBERS |= {E4M3: quantise_plainly} if has_e4m3(torch.device(DEVICE)) else {}
# in the interpreter, which takes any, the others' way with descriptors too
TINY = [
    kernels.PORTABLE,
    *(kernels.Form(16, 32, 32, 4, 2, tma=True, halves=halves) for halves in (True, False)),
]


def forms(x: Tensor, weight: Tensor, add: Tensor | None = None) -> list[kernels.Form]:
    aligned = kernels.takes_descriptors(x, weight, BF16, add, 1)
    return kernels.forms_for(CAPABILITY, aligned) if GPU else TINY[: 3 if aligned else 1]


def draw(M: int, K: int, N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x with rows of unlike sizes, a weight and a bias."""
    size = torch.logspace(-3, 3, M).unsqueeze(1)
    x, weight, bias = torch.randn(M, K) * size, torch.randn(N, K), torch.randn(N)
    return tuple(t.to(DEVICE, dtype) for t in (x, weight, bias))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("numbers", NUMBERS)
def test_rows_are_quantised_as_by_the_twin(
    case: tuple[int, int, int], numbers: torch.dtype, dtype: torch.dtype
) -> None:
    x, _, _ = draw(*case, dtype)
    x[-1] = 0
    for got, wanted in zip(rows_triton.quantise_rows(x, numbers), NUMBERS[numbers](x), strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


@pytest.mark.skipif(E4M3 not in NUMBERS, reason="no e4m3 on this GPU")
def test_every_number_of_e4m3_and_every_middle_is_rounded_to_the_even() -> None:
    every = torch.arange(127).to(torch.uint8).view(E4M3).double()
    middles, near = (every[1:] + every[:-1]) / 2, every.diff() * 2**-18
    # the largest is 448, so that steps are 1: of these sizes, products with them are exact
    x = torch.cat([every, middles, middles - near, middles + near])
    x = torch.cat([x, -x]).to(DEVICE, FP32)
    got, step = rows_triton.quantise_rows(x.unsqueeze(0), E4M3)
    assert step.item() == 1
    even = torch.where(torch.arange(126) % 2 == 0, every[:-1], every[1:])
    wanted = torch.cat([every, even, every[:-1], every[1:]])
    assert torch.equal(got.cpu()[0].double(), torch.cat([wanted, -wanted]))


def test_halves_are_rounded_to_the_even() -> None:
    # the largest is 127, so steps are 1, or a rounding off
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -3.5, 4.49, 126.51, -127.0]], device=DEVICE)
    got, step = rows_triton.quantise_rows(x)
    assert step.item() == pytest.approx(1, rel=2**-22)
    wanted, _ = reference_int8.quantise_rows(x)
    assert torch.equal(got, wanted)
    # both neighbours of a half are as good to a step that is a rounding off; of the rest there is one
    assert got[0, [0, 5, 6, 7]].tolist() == [127, 4, 127, -127]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_give_nan_and_no_other_does(bad: float) -> None:
    x, weight, bias = draw(5, 48, 16, BF16)
    x[2, 7] = bad
    y = int8_linear(x, *quantise_rows(weight), bias)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_products_are_the_twins_bit_for_bit(case: tuple[int, int, int]) -> None:
    x, weight, bias = draw(*case, BF16)
    x, weight = reference_int8.quantise_rows(x), reference_int8.quantise_rows(weight)
    wanted = reference_int8.product(*x, *weight, bias).to(BF16)
    for form in forms(x[0], weight[0]):
        (got,) = kernels.product(*x, *weight, bias, dtype=BF16, finish=Finish(), form=form)
        assert torch.equal(got, wanted), form


@pytest.mark.parametrize("sharing", ["none", "all", "some", "one"])
@pytest.mark.parametrize("case", CASES)
def test_gated_sums_are_the_twins_bit_for_bit(case: tuple[int, int, int], sharing: str) -> None:
    x, weight, bias = draw(*case, BF16)
    M, _, N = case
    x, weight = reference_int8.quantise_rows(x), reference_int8.quantise_rows(weight)
    add = torch.randn(M, N).to(DEVICE, BF16)
    rows = {"none": 0, "all": 1, "some": next(size for size in (5, 2, 1) if M % size == 0), "one": M}[sharing]
    gate = torch.randn(rows, N, device=DEVICE) if rows else None
    wanted = reference_int8.product(*x, *weight, bias, add, gate).to(BF16)
    finish = Finish(add=True, gates=("no", "one", "many")[min(rows, 2)])
    for form in forms(x[0], weight[0], add):
        (got,) = kernels.product(*x, *weight, bias, add, gate, dtype=BF16, finish=finish, form=form)
        assert torch.equal(got, wanted), form


@pytest.mark.parametrize("case", CASES)
def test_parts_are_layers_one_by_one(case: tuple[int, int, int]) -> None:
    drawn = [draw(*case, BF16) for _ in range(3)]
    x = quantise_tokens(drawn[0][0])
    layers = [(*quantise_rows(weight), bias) for _, weight, bias in drawn]
    weight, *rest = (torch.cat(tensors) for tensors in zip(*layers, strict=True))
    wanted = [int8_linear(x, *layer) for layer in layers]
    for form in forms(x.counts, weight):
        outputs = kernels.product(*x[:2], weight, *rest, dtype=BF16, finish=Finish(parts=3), form=form)
        for got, y in zip(outputs, wanted, strict=True):
            assert got.is_contiguous()
            assert torch.equal(got, y), form
    assert all(map(torch.equal, int8_linears(x, weight, *rest, 3), wanted))


def test_gates_are_those_of_samples_or_tokens() -> None:
    x, weight, bias = draw(15, 80, 72, FP32)
    x, add = x.view(3, 5, 80), torch.randn(3, 5, 72, device=DEVICE)
    y = int8_linear(x, *quantise_rows(weight), bias)
    for shape in ((1, 1, 72), (3, 1, 72), (1, 5, 72), (3, 5, 72)):
        gate = torch.randn(shape, device=DEVICE)
        got = int8_linear(x, *quantise_rows(weight), bias, add=add, gate=gate)
        assert torch.equal(got, add + gate * y)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_other_outputs_and_no_bias(dtype: torch.dtype) -> None:
    x, weight, _ = draw(65, 80, 72, dtype)
    x = x.clamp(-8, 8)  # no output beyond fp16
    got = int8_linear(x.view(5, 13, 80), *quantise_rows(weight))
    twin = reference_int8.product(
        *reference_int8.quantise_rows(x), *reference_int8.quantise_rows(weight), None
    )
    assert got.dtype == dtype
    assert torch.equal(got, twin.to(dtype).view(5, 13, 72))


@pytest.mark.parametrize("case", CASES)
def test_gelu(case: tuple[int, int, int]) -> None:
    x, weight, bias = draw(*case, FP32)
    x, weight = quantise_tokens(x), quantise_rows(weight)
    y = reference_int8.product(*x[:2], *weight, bias).double()
    truth = torch.nn.functional.gelu(y, approximate="tanh")
    (got,) = int8_product(x, *weight, bias, gelu=True)
    # an exponential turns roundings of its argument, z, into z as many of its value, which matter while it is
    # not small beside 1 or y beside the outputs: up to z of about 16.  A GPU's exponential and quotient are
    # good to two more each
    assert ((got - truth).abs() <= 32 * 2**-24 * truth.abs() + 2**-24).all()


def test_trial_passes() -> None:
    if not GPU:
        pytest.skip("the trial is for GPUs; the interpreter takes minutes")
    finishes = [
        Finish(),
        Finish(gelu=True),
        Finish(parts=3),
        *(Finish(add=True, gates=gates) for gates in ("no", "one", "many")),
    ]
    for dtype, finish in product((BF16, FP16), finishes):
        trial = Trial(torch.device(DEVICE), dtype, finish)
        for form in kernels.forms_for(CAPABILITY, True):
            assert trial.share(form) <= 1, (form, finish)
