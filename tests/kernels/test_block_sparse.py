"""Block-sparse attention: who runs when, what is refused, and how much 8 bits lose."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from kernels import reference
from kernels.block_sparse import BLOCKS, HEAD_WIDTHS, Trial, masked_attention, sparse_attention
from kernels.block_sparse_int8 import ALLOWED, sparse_attention_int8
from tests.kernels.judging import error

SIZES = {"block_q": 32, "block_k": 32}


def draw(dtype: torch.dtype = torch.float64, rows: int = 70, keys: int = 90) -> tuple[Tensor, ...]:
    """q, k, v and a list; keys have a mean far from zero."""
    q, k, v = (torch.randn(2, 2, length, 16, dtype=dtype) for length in (rows, keys, keys))
    k = k + 3
    return q, k, v, reference.block_map(q, k, **SIZES, ratio=0.7)


def test_on_a_cpu_the_twin_runs_with_its_derivatives() -> None:
    *primals, index = draw()
    attend = partial(sparse_attention, block_index=index, **SIZES)
    wanted = reference.sparse_attention(*primals, index, **SIZES)[0]
    assert torch.equal(attend(*primals), wanted)
    tangents = tuple(torch.randn_like(x) for x in primals)
    with forward_ad.dual_level():
        dual = attend(*map(forward_ad.make_dual, primals, tangents))
        got = forward_ad.unpack_dual(dual).tangent
    h = 1e-5
    ahead, behind = (
        attend(*(x + step * dx for x, dx in zip(primals, tangents, strict=True))) for step in (h, -h)
    )
    # h^2 of the third derivative, and 1e-16 / h of rounding
    assert error(got, (ahead - behind) / (2 * h)) < 1e-7
    low = [x.bfloat16() for x in primals]
    assert attend(*low).dtype == torch.bfloat16


def test_a_mask_keeps_what_is_listed() -> None:
    """Also with blocks that neither 70 rows nor 90 keys are multiples of, of two sizes."""
    sizes = {"block_q": 8, "block_k": 4}
    q, k, v, _ = draw()
    index = reference.block_map(q, k, **sizes, ratio=0.1)
    wanted, _ = reference.sparse_attention(q, k, v, index, **sizes)
    # fp64, summed in another order
    assert error(masked_attention(q, k, v, index, **sizes), wanted) < 1e-14


@pytest.mark.parametrize("op", [sparse_attention, sparse_attention_int8])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, index: (q, k[:, :1], v, index), "k like v"),
        (lambda q, k, v, index: (q, k[..., :0, :], v[..., :0, :], index), "at least one token"),
        (lambda q, k, v, index: (q, k, v.float(), index), "one dtype"),
        (lambda q, k, v, index: (q, k, v, index[:, :, :2]), "for blocks of 32 queries"),
        (lambda q, k, v, index: (q, k, v, index[..., :0]), "from 1 to 3 key blocks"),
        (lambda q, k, v, index: (q, k, v, index.repeat(1, 1, 1, 2)), "from 1 to 3 key blocks"),
        (lambda q, k, v, index: (q, k, v, index.long()), "int64"),
    ],
)
def test_what_does_not_fit_is_refused(op: object, change: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op(*change(*draw()), **SIZES)


def test_eight_bits_refuse_derivatives() -> None:
    q, k, v, index = draw()
    attend = partial(sparse_attention_int8, block_index=index, **SIZES)
    with pytest.raises(ValueError, match="no derivatives"):
        attend(q.clone().requires_grad_(), k, v)
    with torch.no_grad():
        assert not attend(q.clone().requires_grad_(), k, v).requires_grad
    with forward_ad.dual_level(), pytest.raises(ValueError, match="no derivatives"):
        attend(q, k, forward_ad.make_dual(v, v))


def test_eight_bit_scores_are_off_by_steps_of_the_blocks() -> None:
    q, k, v, index = draw()
    centred = k - k.mean(-2, keepdim=True)
    # each factor of a product is off by half a step at most, in each of its 16 numbers
    steps = [x.abs().max() / 127 for x in (q, centred)]
    norms = [x.norm(dim=-1).max() for x in (q, centred)]
    off = (norms[0] * steps[1] + norms[1] * steps[0]) / 2 + steps[0] * steps[1] * 16**0.5 / 4
    wanted, _ = reference.sparse_attention(q, k, v, index, **SIZES)
    got = reference.sparse_attention_int8(q, k, v, index, **SIZES, fp8=False)
    # weights then change by exp(+-2 off) at most, and the output by that share of the largest value
    assert (got - wanted).abs().max() <= math.expm1(2 * off) * v.abs().max()
    assert error(got, wanted) > 1e-4  # something was rounded


def test_e4m3_numbers_cost_their_rounding_and_no_bias() -> None:
    q, k, v, index = draw(rows=700, keys=900)
    exact = reference.sparse_attention_int8(q, k, v, index, **SIZES, fp8=False)
    got = reference.sparse_attention_int8(q, k, v, index, **SIZES, fp8=True)
    # numbers of four digits are off by 2^-4 of themselves at most, by that / sqrt(3) at the root mean square;
    # weights and values err independently
    assert 0.01 < error(got, exact) < 2**0.5 * 2**-4 / 3**0.5
    # rounding up is as likely as down: over 44,800 outputs little is left of it
    assert abs((got * exact).sum() / exact.square().sum() - 1) < 2e-3


@pytest.mark.parametrize("numbers", ALLOWED)
@pytest.mark.parametrize("size", BLOCKS)
def test_what_a_trial_allows_is_the_twins_error_and_a_half(
    size: int, numbers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trial, "HEADS", 2)
    for width in HEAD_WIDTHS:
        trial = Trial(torch.device("cpu"), torch.bfloat16, width, size, size)
        given = (trial.q, trial.k, trial.v, trial.index)
        got = reference.sparse_attention_int8(*given, block_q=size, block_k=size, fp8=numbers == "e4m3")
        (truth,) = trial.truth()["forward"]
        # a half more than the largest, and twice the smallest: a block's largest number grows with its size
        assert ALLOWED[numbers] / 2 < error(got, truth) < ALLOWED[numbers] / 1.4


def test_eight_bits_of_zeros_are_zeros() -> None:
    q, k, v, index = draw()
    for fp8 in (False, True):
        o = reference.sparse_attention_int8(0 * q, 0 * k, 0 * v, index, **SIZES, fp8=fp8)
        assert not o.any()
