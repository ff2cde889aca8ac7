"""The Triton kernels of fused norms: on a GPU, or in the interpreter by test_without_gpu.py."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from kernels import fp8_linear, norms, reference_norms
from kernels import norms_triton as kernels
from kernels.selftest import unfused
from tests.kernels.judging import DEVICE, GPU, widen

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# widths of Wan, a power of two, of small networks and of no tile, with those of heads
WIDTHS = {1536: 128, 5120: 128, 3072: 96, 256: 64, 96: 12, 1542: 6, 20: 10}
HAS_E4M3 = fp8_linear.has_e4m3(torch.device(DEVICE))
# what fp32 loses, of a row's largest number: some 20 roundings
LOSS = 20 * 2**-24
# two samples, with tokens left over by whole programs
SHAPE = (2, 4099) if GPU else (2, 5)


def draw(width: int, dtype: torch.dtype, tokens: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and y, of a mean that is not small and a loud channel, and two signals in fp32."""
    x, y = 3 + torch.randn(2, *SHAPE, width)
    x[..., 1] *= 50
    signals = torch.randn(2, SHAPE[0], tokens, width)
    return *(t.to(DEVICE, dtype) for t in (x, y)), *(signal.to(DEVICE) for signal in signals)


def draw_table(width: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(SHAPE[1], 1, WIDTHS[width] // 2, dtype=torch.float64)
    return angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE)


def judge(name: str, *inputs: Tensor) -> None:
    """Against the twin in fp64: every number is rounded once, beside what fp32 loses."""
    got, truth = getattr(kernels, name)(*inputs), getattr(reference_norms, name)(*widen(inputs))
    assert got.dtype == inputs[0].dtype
    assert got.shape == truth.shape
    got, truth = got.double().flatten(2), truth.flatten(2)
    room = torch.finfo(inputs[0].dtype).eps / 2 * truth.abs() + LOSS * truth.abs().amax(2, keepdim=True)
    assert ((got - truth).abs() <= room).all()


@pytest.mark.parametrize("is_per_token", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("width", WIDTHS)
def test_modulation_and_gated_sums(width: int, dtype: torch.dtype, is_per_token: bool) -> None:
    x, y, shift, scale = draw(width, dtype, SHAPE[1] if is_per_token else 1)
    judge("norm_modulate", x, shift, scale)
    judge("add_gated", x, y, scale)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("width", WIDTHS)
def test_rotated_norms(width: int, dtype: torch.dtype) -> None:
    x, _, weight, _ = draw(width, dtype)
    judge("norm_rotate", x, weight[0, 0], *draw_table(width))


@pytest.mark.skipif(not HAS_E4M3, reason="no e4m3 on this GPU")
@pytest.mark.parametrize("is_per_token", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_e4m3_numbers_are_the_nearest(width: int, is_per_token: bool) -> None:
    x, _, shift, scale = draw(width, BF16, SHAPE[1] if is_per_token else 1)
    numbers, steps = kernels.norm_modulate_fp8(x, shift, scale)
    truth = reference_norms.norm_modulate(*widen((x, shift, scale)))
    assert numbers.dtype == fp8_linear.E4M3
    torch.testing.assert_close(steps.double(), truth.abs().amax(-1) / 448, rtol=LOSS, atol=0)
    truth = truth / steps.double().unsqueeze(-1)
    # half of what is between neighbours, of which there are 8 in a binade, and the smallest is 2^-6
    exponent = torch.frexp(truth.abs()).exponent - 1
    half = 2.0 ** (exponent.clamp(min=-6).double() - 4)
    assert ((numbers.double() - truth).abs() <= half + 448 * LOSS).all()


@pytest.mark.parametrize("is_per_token", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("width", WIDTHS)
def test_8_bit_numbers_are_the_nearest(width: int, dtype: torch.dtype, is_per_token: bool) -> None:
    x, _, shift, scale = draw(width, dtype, SHAPE[1] if is_per_token else 1)
    counts, steps = kernels.norm_modulate_int8(x, shift, scale)
    truth = reference_norms.norm_modulate(*widen((x, shift, scale)))
    assert counts.dtype == torch.int8
    torch.testing.assert_close(steps.double(), truth.abs().amax(-1) / 127, rtol=LOSS, atol=0)
    off = (counts * steps.double().unsqueeze(-1) - truth).abs() / steps.unsqueeze(-1)
    # 127 steps are the largest number
    assert off.max() <= 0.5 + 127 * LOSS


def test_signals_of_one_sample_serve_all() -> None:
    x, _, shift, scale = draw(256, FP32)
    judge("norm_modulate", x, shift[:1], scale[:1])
    judge("add_gated", x.mT.contiguous().mT, x, scale[:1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_give_nan_and_no_other_does(bad: float) -> None:
    x, _, shift, scale = draw(1536, BF16)
    x[1, 2, 7] = bad
    # alone in a first tile, which the others' numbers must not hide
    shift[0, 0, 5] = torch.nan
    for op in (kernels.norm_modulate_int8, *([kernels.norm_modulate_fp8] if HAS_E4M3 else [])):
        steps = op(x, shift, scale)[1]
        assert steps[0].isnan().all()
        assert steps[1].isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("op", [norms.norm_modulate, lambda *args: norms.add_gated(args[0], *args)])
def test_derivatives_are_the_twins(op: Callable[..., Tensor]) -> None:
    x, _, shift, scale = draw(96, FP32)
    args = (x, shift, scale) if op is norms.norm_modulate else (x, scale)
    with forward_ad.dual_level():
        y = op(forward_ad.make_dual(args[0], torch.ones_like(x)), *args[1:])
        assert forward_ad.unpack_dual(y).tangent is not None
    assert op(args[0].requires_grad_(), *args[1:]).grad_fn is not None


def test_public_ops_run_the_kernels() -> None:
    x, y, shift, scale = draw(256, BF16)
    inputs = {
        "norm_modulate": (x, shift, scale),
        "norm_modulate_int8": (x, shift, scale),
        "norm_rotate": (x, shift[0, 0], *draw_table(256)),
        "add_gated": (x, y, scale),
    }
    if HAS_E4M3:
        inputs["norm_modulate_fp8"] = x, shift, scale
    for name, args in inputs.items():
        pairs = zip(*(norms.values(getattr(place, name)(*args)) for place in (norms, kernels)), strict=True)
        assert all(torch.equal(got, wanted) for got, wanted in pairs), name


def test_unfused_ops_are_pytorchs() -> None:
    x, _, shift, scale = draw(256, BF16)
    with unfused():
        assert torch.equal(
            norms.norm_modulate(x, shift, scale), reference_norms.norm_modulate(x, shift, scale)
        )
    # which round between steps, as the kernel does not
    assert not torch.equal(
        norms.norm_modulate(x, shift, scale), reference_norms.norm_modulate(x, shift, scale)
    )
