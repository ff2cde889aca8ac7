"""The public fused norms on a CPU: what the network computes, bit for bit, and its derivatives."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import fp8_linear, int8_linear
from kernels.norms import add_gated, norm_modulate, norm_modulate_fp8, norm_modulate_int8, norm_rotate
from kernels.reference_norms import rotate
from turbodiffusion.models.layers import RMSNorm
from turbodiffusion.models.rope import rotary_table

BF16, FP32 = torch.bfloat16, torch.float32
GRID, HEADS, D = (2, 2, 3), 4, 12
L, E = 12, HEADS * D


def draw(dtype: torch.dtype, tokens: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y (2, L, E) and two signals (2, tokens, E), which are fp32, or fp64."""
    x, y = torch.randn(2, 2, L, E, dtype=torch.float64).to(dtype)
    signals = torch.randn(2, 2, tokens, E, dtype=torch.float64)
    return x, y, *signals.to(torch.promote_types(dtype, FP32))


@pytest.mark.parametrize("tokens", [1, L])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_modulation_is_the_networks(dtype: torch.dtype, tokens: int) -> None:
    x, _, shift, scale = draw(dtype, tokens)
    wanted = torch.addcmul(shift, F.layer_norm(x, (E,), eps=1e-6).float(), 1 + scale)
    assert torch.equal(norm_modulate(x, shift, scale), wanted.to(dtype))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rotated_norm_is_the_networks(dtype: torch.dtype) -> None:
    x, *_ = draw(dtype)
    table = rotary_table(GRID, D, x.device)
    norm = RMSNorm(E).requires_grad_(False)
    torch.nn.init.normal_(norm.weight)
    wanted = rotate(norm(x).unflatten(-1, (HEADS, D)), *table)
    assert torch.equal(norm_rotate(x, norm.weight, *table), wanted)


@pytest.mark.parametrize("tokens", [1, L])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_gated_sum_is_the_networks(dtype: torch.dtype, tokens: int) -> None:
    x, y, gate, _ = draw(dtype, tokens)
    assert torch.equal(add_gated(x, y, gate), torch.addcmul(x, y, gate.to(dtype)))


@pytest.mark.parametrize(
    ("op", "quantise"),
    [(norm_modulate_int8, int8_linear.quantise_rows), (norm_modulate_fp8, fp8_linear.quantise_rows)],
)
def test_quantised_modulation_is_the_quantised_sum(op: Callable, quantise: Callable) -> None:
    x, _, shift, scale = draw(FP32)
    wanted = quantise(norm_modulate(x, shift, scale).flatten(0, 1))
    for got, rows in zip(op(x, shift, scale), wanted, strict=True):
        assert torch.equal(got.flatten(0, 1), rows)


def rotated(x: Tensor, weight: Tensor) -> Tensor:
    return norm_rotate(x, weight[0, 0], *rotary_table(GRID, D, x.device))


@pytest.mark.parametrize(
    ("op", "inputs"), [(norm_modulate, (0, 2, 3)), (add_gated, (0, 1, 2)), (rotated, (0, 2))]
)
def test_derivatives_both_ways(op: Callable[..., Tensor], inputs: tuple[int, ...]) -> None:
    drawn = draw(torch.float64)
    leaves = [drawn[i].requires_grad_() for i in inputs]
    assert torch.autograd.gradcheck(op, leaves, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("op", [norm_modulate_int8, norm_modulate_fp8])
def test_8_bits_refuse_derivatives(op: Callable) -> None:
    x, _, shift, scale = draw(FP32)
    with pytest.raises(ValueError, match="no derivatives"):
        op(x.requires_grad_(), shift, scale)


def test_shapes_that_do_not_fit_are_named() -> None:
    x, y, gate, scale = draw(FP32)
    with pytest.raises(ValueError, match=r"got x \(2, 12, 48\) and \(2, 1, 47\), \(2, 1, 48\)"):
        norm_modulate(x, gate[..., 1:], scale)
    with pytest.raises(ValueError, match=r"got y \(2, 11, 48\), wanted x's \(2, 12, 48\)"):
        add_gated(x, y[:, 1:], gate)
    weight, cos = torch.ones(E), torch.ones(L, 1, D // 2)
    with pytest.raises(ValueError, match="D to divide E"):
        norm_rotate(x, weight, cos[..., 1:], cos[..., 1:])
    with pytest.raises(ValueError, match=r"\(12, 1, 6\), \(11, 1, 6\)"):
        norm_rotate(x, weight, cos, cos[1:])
