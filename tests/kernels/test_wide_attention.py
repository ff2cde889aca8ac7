"""Attention of wide heads: PyTorch's own, and by matrix products on a GPU."""

import pytest
import torch
from torch import Tensor

from kernels import wide_attention as ops


def draw(dtype: torch.dtype, device: str, tokens: int = 130) -> tuple[Tensor, ...]:
    """Parts of one tensor, as they are when projected together; queries that single out keys."""
    qkv = torch.randn(2, tokens, 3 * 384, generator=torch.Generator().manual_seed(0))
    qkv[..., :384] *= 4
    return qkv.to(device, dtype).chunk(3, dim=-1)


def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.double() for x in (q, k, v))
    return (q @ k.mT / 384**0.5).softmax(-1) @ v


@torch.no_grad()
def test_it_is_softmax_attention_of_every_frame() -> None:
    inputs = draw(torch.float32, "cpu")
    # fp32 rounds at 6e-8, in scores of some dozens
    torch.testing.assert_close(ops.wide_attention(*inputs).double(), definition(*inputs), atol=1e-4, rtol=0)


def test_it_has_a_gradient() -> None:
    inputs = [x.clone().requires_grad_() for x in draw(torch.float64, "cpu", tokens=3)]
    assert torch.autograd.gradcheck(lambda *x: ops.wide_attention(*x)[..., :2], inputs)


@pytest.mark.gpu
@pytest.mark.usefixtures("poison")
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_lose_no_more_than_pytorchs_kernel(dtype: torch.dtype) -> None:
    inputs = draw(dtype, "cuda", tokens=1000)
    truth = definition(*inputs)
    lost, kept = ((op(*inputs).double() - truth).norm() for op in (ops.fused, ops.by_products))
    # weights are rounded once divided by their sum, there before
    assert kept < 2 * lost
    assert torch.equal(ops.wide_attention(*inputs), ops.by_products(*inputs))
