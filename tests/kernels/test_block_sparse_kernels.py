"""The Triton kernels of block-sparse attention: on a GPU, or in the interpreter by test_without_gpu.py."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from distill.remat import rematerialize
from kernels import block_sparse_int8_triton as int8
from kernels import block_sparse_triton as sparse
from kernels import reference
from kernels.block_sparse import Trial, sparse_attention
from kernels.block_sparse_int8 import share, sparse_attention_int8
from kernels.selftest import error_share
from tests.kernels.judging import DEVICE, GPU, allowed, differentiate, error, widen
from turbodiffusion.attention import SparseLinearAttention

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# the interpreter runs forms made for any GPU
CAPABILITY = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1] if GPU else 90


class Case(NamedTuple):
    """Queries, keys, head width, and the sizes of blocks."""

    rows: int
    keys: int
    width: int
    block_q: int
    block_k: int


# one token, less than a block, a block and one more, tails of 44, 56 and 16
SMALL = [
    Case(1, 1, 32, 64, 64),
    Case(63, 65, 32, 64, 32),
    Case(64, 300, 32, 64, 64),
    Case(65, 184, 32, 32, 64),
    Case(300, 208, 32, 128, 64),
    Case(130, 200, 32, 128, 128),
]
LARGE = [
    Case(999, 1080, 128, 64, 64),
    Case(1040, 1040, 128, 128, 64),
    Case(1080, 1040, 64, 128, 128),
    Case(1000, 999, 128, 32, 32),
    Case(300, 32760, 128, 64, 64),
    Case(300, 32760, 128, 128, 64),
    # more tiles than two turns of all programs; odd lists, with tails of 16, 56 and 2, and one of one block
    Case(12000, 400, 128, 128, 64),
    Case(20000, 400, 64, 64, 64),
    Case(1000, 1400, 128, 128, 64),
    Case(200, 130, 128, 128, 64),
]
CASES = [*SMALL, *LARGE] if GPU else SMALL
TYPED = [(BF16, case) for case in CASES]
TYPED += [(FP32, case) for case in (SMALL[:3] + [Case(129, 300, 64, 64, 64)] * GPU)]
TYPED += [(FP16, LARGE[0])] * GPU


def draw(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], sparse.Blocks]:
    """q, k, v, as many tangents, and random lists of half of the key blocks, or of one."""
    sizes = [(2, length, 2, case.width) for length in (case.rows, case.keys, case.keys)]
    q, k, v, *tangents = (torch.randn(size).to(DEVICE, dtype).transpose(1, 2) for size in sizes + sizes)
    k = k + 1  # a mean for int8 to take off
    count = -(-case.keys // case.block_k)
    order = torch.rand(2, 2, -(-case.rows // case.block_q), count, device=DEVICE).argsort(-1)
    index = order[..., : max(1, count // 2)].sort(-1).values.int()
    return [q, k, v], tangents, sparse.Blocks(index, case.block_q, case.block_k)


def twin(blocks: sparse.Blocks) -> Callable[..., Tensor]:
    listed = partial(reference.sparse_attention, block_index=blocks.index, block_q=blocks.q, block_k=blocks.k)
    return lambda q, k, v: listed(q, k, v)[0]


def naive(blocks: sparse.Blocks, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Masked attention by PyTorch's operators, each rounding to the inputs' dtype."""
    shape = (*blocks.index.shape[:3], -(-k.shape[2] // blocks.k))
    listed = torch.zeros(shape, device=q.device).scatter(3, blocks.index.long(), 1) > 0
    mask = listed.repeat_interleave(blocks.q, 2).repeat_interleave(blocks.k, 3)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask[:, :, : q.shape[2], : k.shape[2]], -torch.inf)
    return scores.softmax(-1) @ v


def forms(kind: str, dtype: torch.dtype, case: Case) -> list[NamedTuple]:
    every = sparse.forms_for(kind, dtype, CAPABILITY, case.block_q, case.block_k)
    # the interpreter knows no Gluon
    return [form for form in every if GPU or isinstance(form, sparse.Form)]


def eights(block_q: int, block_k: int) -> list[int8.Eight]:
    every = int8.forms_for(CAPABILITY, block_q, block_k)
    return [eight for eight in every if GPU or isinstance(eight.form, sparse.Form)]


@pytest.mark.parametrize(("dtype", "case"), TYPED)
def test_output(dtype: torch.dtype, case: Case) -> None:
    primals, _, blocks = draw(case, dtype)
    sizes = {"block_q": case.block_q, "block_k": case.block_k}
    true_o, true_lse = reference.sparse_attention(*widen(primals), blocks.index, **sizes)
    limit = allowed(naive(blocks, *primals), true_o, true_o.norm(), dtype)
    for form in forms("forward", dtype, case):
        o, lse = sparse.attention(*primals, blocks, form)
        assert o.dtype == dtype
        assert o.transpose(1, 2).is_contiguous()
        assert (o.double() - true_o).norm() <= limit
        # scores are fp32 sums of exact products whatever the dtype, up to a few dozen before they are scaled
        assert (lse - true_lse).abs().max() < 2e-5


@pytest.mark.skipif(not GPU, reason="the interpreter runs one program after the other")
@pytest.mark.parametrize("block_q", [64, 128])
def test_output_is_the_same_every_time(block_q: int) -> None:
    case = Case(20000, 1400, 128, block_q, 64)
    primals, _, blocks = draw(case, BF16)
    for form in forms("forward", BF16, case):
        first = sparse.attention(*primals, blocks, form)
        # a race of loads with products would show once in a while
        for _ in range(50):
            again = sparse.attention(*primals, blocks, form)
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    for eight in eights(block_q, 64):
        quantised = int8.quantise(*primals, blocks, eight.fp8, not isinstance(eight.form, sparse.Form))
        first = int8.attend(quantised, blocks, eight.form, BF16)
        assert all(torch.equal(int8.attend(quantised, blocks, eight.form, BF16), first) for _ in range(50))


@pytest.mark.parametrize(("dtype", "case"), TYPED)
def test_tangent(dtype: torch.dtype, case: Case) -> None:
    primals, tangents, blocks = draw(case, dtype)
    true_o, truth = torch.func.jvp(twin(blocks), tuple(widen(primals)), tuple(widen(tangents)))
    lost_o, lost = torch.func.jvp(partial(naive, blocks), tuple(primals), tuple(tangents))
    for form in forms("tangent", dtype, case):
        o, _, do = sparse.tangent(tuple(primals), tuple(tangents), blocks, form)
        assert (o.double() - true_o).norm() <= allowed(lost_o, true_o, true_o.norm(), dtype)
        assert (do.double() - truth).norm() <= allowed(lost, truth, truth.norm(), dtype)


@pytest.mark.parametrize(("dtype", "case"), TYPED)
def test_gradients(dtype: torch.dtype, case: Case) -> None:
    primals, _, blocks = draw(case, dtype)
    grad = torch.randn_like(primals[0])
    truth = differentiate(twin(blocks), widen(primals), grad.double())
    lost = differentiate(partial(naive, blocks), primals, grad)
    # a gradient may vanish (one key: that of q and k); what is left is rounding of the others' size
    size = max(x.norm() for x in truth)
    o, lse = sparse.attention(*primals, blocks, forms("forward", dtype, case)[0])
    pairs = zip(forms("queries", dtype, case), forms("keys", dtype, case), strict=True)
    for of_queries, of_keys in pairs:
        got = sparse.backward((*primals, o, lse), grad, blocks, of_queries, of_keys)
        for ours, plain_grad, true_grad in zip(got, lost, truth, strict=True):
            assert (ours.double() - true_grad).norm() <= allowed(plain_grad, true_grad, size, dtype)


def test_keys_that_nobody_lists_get_no_gradient() -> None:
    primals, _, blocks = draw(Case(130, 96, 32, 32, 32), BF16)
    # every block of queries has the same list, of the last block
    index = torch.full_like(blocks.index[..., :1], 2)
    grads = differentiate(
        partial(sparse_attention, block_index=index, block_q=32, block_k=32),
        primals,
        torch.randn_like(primals[0]),
    )
    assert not grads[1][:, :, :64].any()
    assert not grads[2][:, :, :64].any()
    assert grads[2][:, :, 64:].abs().min() > 0


def test_large_negative_scores_leave_gradients_finite() -> None:
    # exp(-lse) overflows for the padding keys of the last block
    q = torch.full((1, 1, 3, 32), -30.0, device=DEVICE)
    k = torch.full((1, 1, 5, 32), 30.0, device=DEVICE)
    index = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=DEVICE)
    attend = partial(sparse_attention, block_index=index, block_q=32, block_k=32)
    grads = differentiate(attend, [q, k, torch.randn_like(k)], torch.randn_like(q))
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("given", ["qkv", "q", "kv"])
def test_dual_numbers_and_the_graph_beside_them(given: str) -> None:
    case = Case(65, 100, 32, 64, 32)
    primals, tangents, blocks = draw(case, FP32)
    tangents = [x if name in given else None for name, x in zip("qkv", tangents, strict=True)]
    zeros = [torch.zeros_like(x) if t is None else t for x, t in zip(primals, tangents, strict=True)]
    truth = torch.func.jvp(twin(blocks), tuple(widen(primals)), tuple(widen(zeros)))
    attend = partial(sparse_attention, block_index=blocks.index, block_q=64, block_k=32)
    leaf = primals[0].clone().requires_grad_()
    with forward_ad.dual_level():
        duals = [
            x if t is None else forward_ad.make_dual(x, t)
            for x, t in zip((leaf, *primals[1:]), tangents, strict=True)
        ]
        o, do = forward_ad.unpack_dual(attend(*duals))
    # fp32 sums in another order, and exponentials of a GPU, good to two roundings
    assert error(o, truth[0]) < 1e-5
    assert error(do, truth[1]) < 1e-5
    (grad,) = torch.autograd.grad(o.square().sum(), leaf)
    wide = widen(primals)
    (wanted,) = torch.autograd.grad(twin(blocks)(wide[0].requires_grad_(), *wide[1:]).square().sum(), wide[0])
    assert error(grad, wanted) < 1e-5


def test_checkpointing_can_keep_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    primals, _, _ = draw(Case(65, 100, 64, 64, 32), BF16)
    grad, attend, attended = torch.randn_like(primals[0]), sparse.attention, []
    monkeypatch.setattr(sparse, "attention", lambda *given: attended.append(given) or attend(*given))
    core = SparseLinearAttention(64, ratio=0.5, block_q=64, block_k=32).to(DEVICE, BF16)
    results = {"first": differentiate(core, primals, grad)}  # on a GPU, after a trial
    for mode, forwards in (("none", 1), ("block", 2), ("keep_attention", 1)):
        rematerialize([core], mode)
        attended.clear()
        results[mode] = differentiate(core, primals, grad)
        assert len(attended) == forwards
    for some in results.values():
        assert all(torch.equal(x, y) for x, y in zip(some, results["first"], strict=True))


def test_other_layouts_and_sizes() -> None:
    primals, _, blocks = draw(Case(40, 70, 32, 32, 32), FP32)
    # every second row of a wider tensor: neither packed nor tokens first
    primals[0] = torch.randn(2, 2, 80, 64, device=DEVICE)[:, :, ::2, 32:]
    o = sparse_attention(*primals, blocks.index, block_q=32, block_k=32)
    # fp32 sums in another order, and exponentials of a GPU, good to two roundings
    assert error(o, twin(blocks)(*widen(primals))) < 1e-5
    # what the kernels do not take, the twin does
    primals, _, blocks = draw(Case(40, 70, 24, 48, 16), FP32)
    o = sparse_attention(*primals, blocks.index, block_q=48, block_k=16)
    assert error(o, twin(blocks)(*widen(primals))) < 1e-5


@pytest.mark.parametrize("sizes", [(3, 4, 2), (7, 5, 5), (1, 1, 1)])
def test_transposed_lists_hold_the_same_pairs(sizes: tuple[int, int, int]) -> None:
    queries, keys, kept = sizes
    index = torch.rand(2, 3, queries, keys, device=DEVICE).argsort(-1)[..., :kept].sort(-1).values.int()
    rows, starts = sparse.transposed(index, keys)
    wanted = [
        [i for i in range(queries) if key in index.view(6, queries, kept)[head, i]]
        for head in range(6)
        for key in range(keys)
    ]
    bounds = starts.tolist()
    got = [rows[start:end].tolist() for start, end in pairwise(bounds)]
    assert got == wanted
    assert rows.dtype == starts.dtype == torch.int32


@pytest.mark.parametrize("kind", ["forward", "tangent", "queries", "keys"])
def test_the_trial_tells_right_from_wrong(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(Trial, "HEADS", 1)
    trial = Trial(torch.device(DEVICE), BF16, 32, 32, 32)
    truth = trial.truth()[kind]
    eps = torch.finfo(BF16).eps
    assert error_share(trial.run(kind, sparse.PORTABLE), truth, eps) < 0.5
    # keys of one list entry in 18 differ
    trial.index = trial.index.clone()
    trial.index[:, :, 0, 0] = 4
    assert error_share(trial.run(kind, sparse.PORTABLE), truth, eps) > 10


@pytest.mark.parametrize("eight", eights(32, 32), ids=str)
def test_the_trial_of_eight_bits_tells_right_from_wrong(
    eight: int8.Eight, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not GPU:
        monkeypatch.setattr(Trial, "HEADS", 1)
    trial = Trial(torch.device(DEVICE), BF16, 32, 32, 32)
    assert 0.5 < share(trial, eight) < 0.9
    # keys of one list entry in 18 differ
    trial.index = trial.index.clone()
    trial.index[:, :, 0, 0] = 4
    assert share(trial, eight) > 2


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_eight_bits_lose_what_their_twin_loses(case: Case, fp8: bool) -> None:
    if fp8 and CAPABILITY < 89:
        pytest.skip("this GPU multiplies no e4m3")
    primals, _, blocks = draw(case, BF16)
    sizes = {"block_q": case.block_q, "block_k": case.block_k}
    truth = reference.sparse_attention(*widen(primals), blocks.index, **sizes)[0]
    wanted = reference.sparse_attention_int8(*primals, blocks.index, **sizes, fp8=fp8)
    # the twin's own error, a tenth more for what differs in rounding, and the rounding of the result
    limit = 1.1 * error(wanted, truth) + torch.finfo(BF16).eps / 2
    for eight in eights(case.block_q, case.block_k):
        if eight.fp8 == fp8:
            o = int8.attention(*primals, blocks, eight)
            assert o.dtype == BF16
            assert error(o, truth) <= limit


@pytest.mark.parametrize("fp8", [True, False])
def test_eight_bits_of_one_tile_equal_their_twin(fp8: bool) -> None:
    if fp8 and CAPABILITY < 89:
        pytest.skip("this GPU multiplies no e4m3")
    # with one tile of keys the largest score so far is the largest, and both round the same weights
    (_, _, v), _, blocks = draw(Case(130, 90, 64, 64, 32), BF16)
    blocks = blocks._replace(index=blocks.index[..., :1].contiguous())
    # 8 bits hold what is drawn, up to the largest in every block and channel, and the mean of keys is 0: of
    # other numbers some, as half of the largest, are in the middle between two, and moved all of a row
    q, k = torch.randint(-127, 128, (2, 2, 130, 64)), torch.randint(-127, 128, (2, 2, 45, 64))
    q[..., 0], k[..., 0] = 127, 127
    v = v.clamp(-3.5, 3.5).to(torch.float8_e4m3fn)
    v[:, :, 0] = 3.5
    primals = [x.to(DEVICE, BF16) for x in (q / 64, torch.cat([k, -k], 2) / 64, v)]
    wanted = reference.sparse_attention_int8(*primals, blocks.index, block_q=64, block_k=32, fp8=fp8)
    # mean squares.  A rounding of results to bf16, and without fp8 another of weights: (2^-9)^2 each.  With
    # fp8, Hopper's sums of 14 bits: (2^-10)^2; and weights on the other side of the middle between two e4m3
    # numbers, which are up to an 8th apart.  Exponents below 16 and eight roundings leave them uncertain by
    # 2^-17: a share of 2^-17 * 2 / d falls on the other side, d away, which is 2^-16 d or 2^-19; four times
    # that, as such weights are four of 16,640
    limit = (2**-18 + (2**-20 + 2**-17 if fp8 else 2**-18)) ** 0.5
    for eight in eights(64, 32):
        if eight.fp8 == fp8:
            assert error(int8.attention(*primals, blocks, eight), wanted.double()) < limit


def test_quantised_numbers_are_the_nearest() -> None:
    (q, k, v), _, blocks = draw(Case(70, 90, 32, 64, 32), BF16)
    k = k + 20  # a mean larger than what is left
    x = int8.quantise(q, k, v, blocks, fp8=True)
    # every block uses all of int8's range, the last and shorter one too
    for numbers, size in ((x.q, 64), (x.k, 32)):
        assert all((part.abs().amax((1, 3)) == 127).all() for part in numbers.split(size, dim=1))
    steps = x.k_step.repeat_interleave(32, 2)[:, :, :90, None]
    wanted = k.double() - k.double().mean(2, keepdim=True)
    # half a step, and fp32 roundings of a mean of 90 numbers
    assert ((x.k.transpose(1, 2) * steps.double() - wanted).abs() <= 0.5001 * steps).all()
    steps = x.q_step.repeat_interleave(64, 2)[:, :, :70, None]
    assert ((x.q.transpose(1, 2) * steps.double() - q).abs() <= 0.5001 * steps).all()
    values = x.v.to(torch.float64).mT.flatten(2, 3)
    assert not values[:, :, 90:].any()
    paired = int8.quantise(q, k, v, blocks, fp8=True, paired=True).v.to(torch.float64).mT.flatten(2, 3)
    order = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15], device=DEVICE)
    assert torch.equal(paired, values.unflatten(2, (-1, 16))[:, :, :, order].flatten(2, 3))
    # e4m3 has four digits from 2^-6 on and steps of 2^-9 below
    off = (values[:, :, :90] - v.double() / x.v_step[:, :, None]).abs()
    assert (off <= values[:, :, :90].abs().clamp(min=2**-6) * 2**-4 * 1.0001).all()


def test_of_many_keys_some_give_the_mean_and_all_values_the_steps() -> None:
    # the last chunk is one token long
    count = 10 * int8.CHUNK + 1
    (q, k, v), _, blocks = draw(Case(1, count, 32, 64, 64), BF16)
    x = int8.quantise(q, k, v, blocks, fp8=True)
    steps = x.k_step.double().repeat_interleave(64, 2)[:, :, :count, None]
    # one vector of a head is half a step, or less, from what each of its keys lost
    lost = k.double() - steps * x.k.transpose(1, 2)
    mean = (
        k[:, :, torch.arange(count, device=DEVICE) % int8.CHUNK < int8.SAMPLE].double().mean(2, keepdim=True)
    )
    assert ((lost - mean).abs() <= 0.5001 * steps).all()
    # the largest value of every channel is the largest e4m3, wherever it is
    assert (x.v.double().abs().amax((2, 4)) == 448).all()
    # an fp32 rounding
    assert error(x.v_step, v.double().abs().amax(2) / 448) < 1e-6


def test_public_eight_bit_op_reaches_the_kernels() -> None:
    (q, k, v), _, blocks = draw(Case(70, 90, 32, 64, 32), BF16)
    o = sparse_attention_int8(q, k, v, blocks.index, block_q=64, block_k=32)
    form = int8.forms_for(CAPABILITY if GPU else 0, 64, 32)[0]
    assert torch.equal(o, int8.attention(q, k, v, blocks, form))
