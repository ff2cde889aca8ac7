"""The twins of SLA: the block map against a loop, both branches against what defines them, derivatives."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from kernels import reference
from kernels.reference import block_map, kept_blocks, linear_attention, sparse_attention
from tests.kernels.judging import error

BLOCKS = {"block_q": 4, "block_k": 3}
# queries and keys: whole blocks, a tail of each, less than one block, one token
LENGTHS = [(8, 9), (10, 11), (3, 2), (1, 1), (9, 16)]


def draw(rows: int, keys: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v and their tangents; keys and values have a mean far from zero."""
    sizes = [(2, 3, length, 8) for length in (rows, keys, keys)]
    q, k, v, *tangents = (torch.randn(size, dtype=dtype) for size in sizes + sizes)
    return q, k + 2, v - 1, *tangents


def choose(rows: int, keys: int, kept: int) -> Tensor:
    """A random ascending list of key blocks for every head and block of queries."""
    count = math.ceil(keys / BLOCKS["block_k"])
    order = torch.rand(2, 3, math.ceil(rows / BLOCKS["block_q"]), count).argsort(-1)
    return order[..., : min(kept, count)].sort(-1).values.int()


def token_mask(index: Tensor, rows: int, keys: int, block_q: int, block_k: int) -> Tensor:
    """Who attends to whom (B, N, L, S), one list entry at a time."""
    mask = torch.zeros(*index.shape[:2], rows, keys, dtype=torch.bool)
    for b, n, i, j in np.ndindex(*index.shape):
        first = int(index[b, n, i, j]) * block_k
        mask[b, n, i * block_q : (i + 1) * block_q, first : first + block_k] = True
    return mask


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def brute_force_map(q: Tensor, k: Tensor, block_q: int, block_k: int, kept: int) -> np.ndarray:
    """block_map by loops, in fp64."""
    q, k = q.double().numpy(), k.double().numpy()
    rows = []
    for b, n, first in np.ndindex(*q.shape[:2], math.ceil(q.shape[2] / block_q)):
        centred = k[b, n] - k[b, n].mean(0)
        query = q[b, n, first * block_q : (first + 1) * block_q].mean(0)
        starts = range(0, len(centred), block_k)
        scores = [query @ centred[start : start + block_k].mean(0) for start in starts]
        ranked = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
        rows.append(sorted(ranked[:kept]))
    return np.array(rows).reshape(*q.shape[:2], -1, kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "keys"), [*LENGTHS, (65, 63), (100, 100)])
def test_block_map_equals_a_loop(rows: int, keys: int, dtype: torch.dtype) -> None:
    # bf16 draws too: sums and scores are fp32, which no two of these scores are near enough to tie in
    q, k, *_ = draw(rows, keys, dtype)
    index = block_map(q, k, **BLOCKS, ratio=0.5)
    kept = kept_blocks(0.5, math.ceil(keys / 3))
    assert index.dtype == torch.int32
    np.testing.assert_array_equal(index.numpy(), brute_force_map(q, k, 4, 3, kept))


def test_scores_do_not_round_to_bf16() -> None:
    # block means 1 + 1 / 256 and 1: one number in bf16, where the lower index, the worse block, would win
    q = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    k = torch.tensor([1.0, 1.0, 1.0, 1 + 1 / 128]).to(torch.bfloat16).view(1, 1, 4, 1)
    assert block_map(q, k, block_q=1, block_k=2, ratio=0.5).item() == 1


def test_a_large_mean_of_the_keys_does_not_hide_their_differences() -> None:
    # in fp32 the products 2^24 and 2^24 + 1 are one number: a tie, where the lower index would win
    k = torch.tensor([[2.0**24, 0.0], [2.0**24, 1.0]]).view(1, 1, 2, 2)
    assert block_map(torch.ones(1, 1, 1, 2), k, block_q=1, block_k=1, ratio=0.5).item() == 1


def test_of_equal_scores_the_lower_index_is_kept() -> None:
    # small integers and powers of two: every mean and product is exact, so that ties are
    high = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0.0])
    k = high.repeat_interleave(2).view(1, 1, 16, 1)
    q = torch.ones(1, 1, 4, 1)
    for kept, wanted in [(1, [1]), (3, [1, 3, 4]), (4, [1, 3, 4, 6]), (6, [0, 1, 2, 3, 4, 6])]:
        index = block_map(q, k, block_q=2, block_k=2, ratio=kept / 8)
        assert index.tolist() == [[[wanted, wanted]]]
    # long rows are sorted otherwise than short ones
    index = block_map(q, torch.ones(1, 1, 2000, 1), block_q=2, block_k=2, ratio=0.3)
    assert torch.equal(index, torch.arange(300, dtype=torch.int32).expand(1, 1, 2, 300))


def test_a_shorter_last_block_is_averaged_over_its_own_length() -> None:
    # the last key alone has mean 3; over a whole block of 4 it would have 3 / 4 and lose against 1
    k = torch.tensor([1.0] * 4 + [0.0] * 4 + [3.0]).view(1, 1, 9, 1)
    assert block_map(torch.ones(1, 1, 1, 1), k, block_q=4, block_k=4, ratio=0.34).tolist() == [[[[2]]]]


@pytest.mark.parametrize(
    ("ratio", "blocks", "kept"),
    # the published lengths, rounded down, and never none nor more than there are
    [
        (0.1, 512, 51),
        (0.15, 512, 76),
        (0.1, 1182, 118),
        (0.1, 9, 1),
        (1e-9, 512, 1),
        (1.0, 7, 7),
        (0.5, 1, 1),
    ],
)
def test_number_of_kept_blocks(ratio: float, blocks: int, kept: int) -> None:
    assert kept_blocks(ratio, blocks) == kept
    q, k, *_ = draw(3, 3 * blocks)
    assert block_map(q, k, **BLOCKS, ratio=ratio).shape == (2, 3, 1, kept)


def test_map_ignores_derivatives() -> None:
    q, k, _, dq, dk, _ = draw(10, 11)
    wanted = block_map(q, k, **BLOCKS, ratio=0.5)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.requires_grad_(), dx) for x, dx in ((q, dq), (k, dk))]
        assert torch.equal(block_map(*duals, **BLOCKS, ratio=0.5), wanted)


@pytest.mark.parametrize("kept", [1, 2, 100])
@pytest.mark.parametrize(("rows", "keys"), LENGTHS)
def test_sparse_branch_equals_masked_dense_attention(rows: int, keys: int, kept: int) -> None:
    q, k, v, *_ = draw(rows, keys)
    index = choose(rows, keys, kept)
    o, lse = sparse_attention(q, k, v, index, **BLOCKS)
    mask = token_mask(index, rows, keys, **BLOCKS)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf)
    # fp64 rounding
    assert error(o, wanted) < 1e-14
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-13, atol=1e-13)


def test_order_of_a_list_does_not_matter() -> None:
    q, k, v, *_ = draw(10, 11)
    index = choose(10, 11, 3)
    o, _ = sparse_attention(q, k, v, index, **BLOCKS)
    # fp64 rounding: sums in another order, the padded last block first
    assert error(sparse_attention(q, k, v, index.flip(-1), **BLOCKS)[0], o) < 1e-14


def test_low_precision_is_computed_in_fp32() -> None:
    q, k, v, *_ = draw(10, 11, torch.bfloat16)
    index = choose(10, 11, 2)
    o, lse = sparse_attention(q, k, v, index, **BLOCKS)
    wanted, _ = sparse_attention(q.double(), k.double(), v.double(), index, **BLOCKS)
    linear = linear_attention(q, k, v, "softmax")
    assert o.dtype == lse.dtype == linear.dtype == torch.float32
    # a few fp32 roundings, three orders below one of bf16
    assert error(o.double(), wanted) < 1e-6
    wanted = linear_attention(q.double(), k.double(), v.double(), "softmax")
    assert error(linear.double(), wanted) < 1e-6


@pytest.mark.parametrize("workspace", [1, 1 << 26], ids=["in chunks", "at once"])
def test_sparse_gradients_equal_finite_differences(workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "WORKSPACE", workspace)
    primals = [x[:1, :2].contiguous().requires_grad_() for x in draw(6, 7)[:3]]
    fn = partial(sparse_attention, block_index=choose(6, 7, 2)[:1, :2], **BLOCKS)
    # both outputs, in reverse and along tangents, of every input alone
    assert torch.autograd.gradcheck(fn, primals, check_forward_ad=True)


@pytest.mark.parametrize(("rows", "keys"), LENGTHS)
def test_both_derivatives_equal_those_of_masked_attention(rows: int, keys: int) -> None:
    *primals, dq, dk, dv = draw(rows, keys)
    index = choose(rows, keys, 2)
    plain = partial(masked, mask=token_mask(index, rows, keys, **BLOCKS))

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, index, **BLOCKS)[0]

    got = torch.func.jvp(sparse, tuple(primals), (dq, dk, dv))[1]
    # fp64 rounding
    assert error(got, torch.func.jvp(plain, tuple(primals), (dq, dk, dv))[1]) < 1e-13
    primals = [x.requires_grad_() for x in primals]
    grad = torch.randn_like(primals[0])
    got = torch.autograd.grad(sparse(*primals), primals, grad)
    wanted = torch.autograd.grad(plain(*primals), primals, grad)
    size = max(x.norm() for x in wanted)  # with one key, those of q and k vanish
    assert all((x - y).norm() < 1e-13 * size for x, y in zip(got, wanted, strict=True))  # fp64 rounding


@pytest.mark.parametrize("branch", ["sparse", "softmax", "elu", "relu"])
def test_tangent_equals_central_differences(branch: str) -> None:
    *primals, dq, dk, dv = draw(10, 11)
    primals = [x + 0.01 * x.sign() for x in primals]  # no step crosses the kink of relu
    index = choose(10, 11, 2)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if branch == "sparse":
            return sparse_attention(q, k, v, index, **BLOCKS)[0]
        return linear_attention(q, k, v, branch)

    with torch.no_grad(), forward_ad.dual_level():
        got = forward_ad.unpack_dual(fn(*map(forward_ad.make_dual, primals, (dq, dk, dv)))).tangent
    h = 1e-6
    ahead, behind = (
        fn(*(x + step * dx for x, dx in zip(primals, (dq, dk, dv), strict=True))) for step in (h, -h)
    )
    # 1e-16 / h of rounding, and h^2 of the third derivative, which is large where relu leaves few features
    assert error(got, (ahead - behind) / (2 * h)) < 1e-8


def test_gradients_beside_a_tangent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "WORKSPACE", 1)
    q, k, v, dq, *_ = draw(10, 11)
    index = choose(10, 11, 2)
    q.requires_grad_()
    with forward_ad.dual_level():
        dual = sparse_attention(forward_ad.make_dual(q, dq), k, v, index, **BLOCKS)[0]
        out, tangent = forward_ad.unpack_dual(dual)
    assert tangent is not None
    (got,) = torch.autograd.grad(out.square().sum(), q)
    (wanted,) = torch.autograd.grad(masked(q, k, v, token_mask(index, 10, 11, **BLOCKS)).square().sum(), q)
    assert error(got, wanted) < 1e-13  # fp64 rounding


def test_the_graph_keeps_no_more_than_inputs_and_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 1, 512, 4, requires_grad=True) for _ in range(3))
    index = block_map(q, k, block_q=8, block_k=8, ratio=0.5)
    sizes = {}
    monkeypatch.setattr(reference, "WORKSPACE", 1)

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o, _ = sparse_attention(q, k, v, index, block_q=8, block_k=8)
    # all selected scores would be 512 * 512 / 2
    assert sum(sizes.values()) < 512 * 512 / 8
    o.sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
@pytest.mark.parametrize(("rows", "keys"), LENGTHS)
def test_linear_branch_equals_the_quadratic_formula(rows: int, keys: int, feature_map: str) -> None:
    q, k, v, *_ = draw(rows, keys)
    # the published maps, written out
    features = {
        "softmax": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
        "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
        "relu": lambda x: x.clamp(min=0),
    }[feature_map]
    weights = features(q) @ features(k).mT
    wanted = weights @ v / (1e-5 + weights.sum(-1, keepdim=True))
    # fp64 rounding
    assert error(linear_attention(q, k, v, feature_map), wanted) < 1e-14


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_linear_gradients_equal_finite_differences(feature_map: str) -> None:
    # no step crosses the kink of relu
    primals = [(x + 0.01 * x.sign())[:1, :1].requires_grad_() for x in draw(4, 5)[:3]]
    fn = partial(linear_attention, feature_map=feature_map)
    assert torch.autograd.gradcheck(fn, primals, check_forward_ad=True)


def test_queries_without_features_get_zero() -> None:
    q, k, v, *_ = draw(5, 6)
    assert linear_attention(-q.abs(), k, v, "relu").abs().max() == 0
