"""Attention with a tangent: its plain twin against PyTorch, and who runs when."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import reference
from kernels.flash_jvp import attention
from tests.kernels.judging import error
from turbodiffusion.attention import DenseAttention


def draw(rows: int = 5, keys: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v and their tangents."""
    sizes = [(2, 3, length, 8) for length in (rows, keys, keys)]
    return tuple(torch.randn(size, dtype=dtype) for size in sizes + sizes)


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


@pytest.mark.parametrize("given", ["qkv", "q", "k", "v", "kv"])
def test_twin_equals_functorch_of_plain_attention(given: str) -> None:
    *primals, dq, dk, dv = draw()
    tangents = [x if name in given else None for name, x in zip("qkv", (dq, dk, dv), strict=True)]
    o, lse, do = reference.attention(*primals, *tangents)
    zeros = [torch.zeros_like(x) if t is None else t for x, t in zip(primals, tangents, strict=True)]
    wanted_o, wanted_do = torch.func.jvp(naive, tuple(primals), tuple(zeros))
    # fp64 rounding
    assert error(o, wanted_o) < 1e-14
    assert error(do, wanted_do) < 1e-13
    q, k, _ = primals
    assert torch.allclose(lse, (q @ k.mT / 8**0.5).logsumexp(-1), rtol=1e-14)


def test_online_sums_over_key_blocks_give_the_same() -> None:
    # the recurrence that the kernels run (arXiv:2205.14135, and a tangent), in blocks of 3 keys
    q, k, v, dq, dk, dv = draw()
    scale = q.shape[-1] ** -0.5
    m = torch.full(q.shape[:-1], -torch.inf, dtype=q.dtype)
    l, r = torch.zeros_like(m), torch.zeros_like(m)
    o, do = torch.zeros_like(q), torch.zeros_like(q)
    for kb, vb, dkb, dvb in zip(*(x.split(3, dim=2) for x in (k, v, dk, dv)), strict=True):
        s = scale * q @ kb.mT
        m_new = torch.maximum(m, s.amax(-1))
        p, shrink = (s - m_new[..., None]).exp(), (m - m_new).exp()
        h = p * scale * (dq @ kb.mT + q @ dkb.mT)
        l, r, m = l * shrink + p.sum(-1), r * shrink + h.sum(-1), m_new
        o = o * shrink[..., None] + p @ vb
        do = do * shrink[..., None] + p @ dvb + h @ vb
    o = o / l[..., None]
    do = do / l[..., None] - (r / l)[..., None] * o
    wanted_o, wanted_lse, wanted_do = reference.attention(q, k, v, dq, dk, dv)
    # fp64 rounding
    assert error(o, wanted_o) < 1e-13
    assert error(m + l.log(), wanted_lse) < 1e-13
    assert error(do, wanted_do) < 1e-13


def test_both_derivatives_equal_finite_differences() -> None:
    primals = [x.requires_grad_() for x in draw(3, 4)[:3]]
    # every input alone, so that the others' tangents are absent, and backward
    assert torch.autograd.gradcheck(attention, primals, check_forward_ad=True)


def test_an_ordinary_pass_has_gradients_beside_a_tangent() -> None:
    q, k, v, dq, *_ = draw()
    q.requires_grad_()
    with forward_ad.dual_level():
        out, tangent = forward_ad.unpack_dual(attention(forward_ad.make_dual(q, dq), k, v))
    assert tangent is not None
    (got,) = torch.autograd.grad(out.square().sum(), q)
    (wanted,) = torch.autograd.grad(naive(q, k, v).square().sum(), q)
    # fp64 rounding
    assert error(got, wanted) < 1e-13


def test_functorch_reaches_the_rule_too() -> None:
    *primals, dq, dk, dv = draw()
    got = torch.func.jvp(attention, tuple(primals), (dq, dk, dv))[1]
    wanted = torch.func.jvp(naive, tuple(primals), (dq, dk, dv))[1]
    # fp64 rounding
    assert error(got, wanted) < 1e-13


def test_bf16_tangent_loses_no_more_than_pytorch() -> None:
    tensors = draw(40, 50, torch.bfloat16)
    truth = reference.attention(*(x.double() for x in tensors))[2]
    with torch.no_grad(), forward_ad.dual_level():
        duals = list(map(forward_ad.make_dual, tensors[:3], tensors[3:]))
        got = forward_ad.unpack_dual(DenseAttention()(*duals)).tangent
        with sdpa_kernel(SDPBackend.MATH):
            plain = forward_ad.unpack_dual(torch.nn.functional.scaled_dot_product_attention(*duals)).tangent
    assert got.dtype == torch.bfloat16
    assert error(got, truth) <= error(plain, truth)


def test_dense_attention_is_pytorchs_unless_a_tangent_comes() -> None:
    q, k, v, *_ = draw(dtype=torch.float32)
    core = DenseAttention()
    assert torch.equal(core(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))
    with torch.no_grad(), forward_ad.dual_level():
        assert forward_ad.unpack_dual(core(q, k, v)).tangent is None
        for number in range(3):
            inputs = [q, k, v]
            inputs[number] = forward_ad.make_dual(inputs[number], torch.ones_like(inputs[number]))
            assert forward_ad.unpack_dual(core(*inputs)).tangent is not None
