"""Sparse attention and the linear branch in one kernel: on a GPU; by test_without_gpu.py, one by one."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.block_sparse import Trial
from kernels.block_sparse_linear import (
    Settings,
    _sound,
    fused,
    has_kernel,
    separate,
    sparse_linear_attention,
    together,
)
from kernels.linear_attention import plain
from kernels.reference import FEATURE_MAPS
from tests.kernels.judging import DEVICE, GPU, differentiate, error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

BF16, FP32 = torch.bfloat16, torch.float32
SETTINGS = [Settings(128, 64, name, int8) for int8 in (False, True) for name in FEATURE_MAPS]
SETTINGS += [Settings(128, 32, "softmax", int8=False), Settings(128, 128, "softmax", int8=False)]


class Case(NamedTuple):
    """Queries, keys, listed blocks of keys and head width."""

    rows: int
    keys: int
    kept: int
    width: int


# one token; less than a block; whole ones; tails, odd lists; more tiles than two turns of all programs
CASES = [
    Case(1, 1, 1, 128),
    Case(63, 130, 1, 128),
    Case(128, 256, 2, 128),
    Case(300, 1400, 7, 128),
    Case(1000, 1400, 6, 64),
    Case(20000, 1416, 11, 128),
]


def draw(case: Case, settings: Settings, dtype: torch.dtype = BF16) -> list[Tensor]:
    """q, k, v, a random list, weight and bias."""
    sizes = [(2, length, 2, case.width) for length in (case.rows, case.keys, case.keys)]
    q, k, v = (torch.randn(size).to(DEVICE, dtype).transpose(1, 2) for size in sizes)
    blocks = -(-case.rows // settings.block_q), -(-case.keys // settings.block_k)
    order = torch.rand(2, 2, *blocks, device=DEVICE).argsort(-1)
    index = order[..., : min(case.kept, blocks[1])].sort(-1).values.int()
    # all parts of the sum are of one size
    weight, bias = torch.randn(case.width, case.width), torch.randn(case.width) / 4
    return [q, k + 1, v + 0.5, index, weight.to(DEVICE, dtype), bias.to(DEVICE, dtype)]


def truth_of(inputs: list[Tensor], settings: Settings) -> Tensor:
    """In fp64."""
    q, k, v, index, weight, bias = (x.double() if x.is_floating_point() else x for x in inputs)
    sizes = {"block_q": settings.block_q, "block_k": settings.block_k}
    sparse, _ = reference.sparse_attention(q, k, v, index, **sizes)
    return plain(q, k, v, weight, bias, sparse, settings.feature_map)


def skip_without_kernel(width: int, settings: Settings) -> None:
    if not (GPU and has_kernel(torch.device(DEVICE), BF16, width, settings)):
        pytest.skip("there is one kernel on Hopper GPUs alone")


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("case", CASES)
def test_one_kernel_is_no_worse_than_two(case: Case, settings: Settings) -> None:
    skip_without_kernel(case.width, settings)
    inputs = draw(case, settings)
    truth = truth_of(inputs, settings)
    got = fused(*inputs, settings)
    assert got.dtype == BF16
    assert got.transpose(1, 2).is_contiguous()
    # those are held to fp64 by tests of their own; here a rounding is left out, which helps, and a tenth luck
    assert error(got, truth) <= 1.1 * error(separate(*inputs, settings), truth)
    # a race of loads with products would show once in a while
    assert all(torch.equal(fused(*inputs, settings), got) for _ in range(20))


@pytest.mark.parametrize("int8", [False, True])
def test_the_trial_of_a_machine_accepts_the_kernel(int8: bool) -> None:
    settings = Settings(128, 64, "softmax", int8)
    skip_without_kernel(128, settings)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")  # of a form that was passed over
        assert sound(128, settings, False) is fused


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_trial_of_a_machine_accepts_one_backward(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not GPU:
        monkeypatch.setattr(Trial, "HEADS", 1)  # the interpreter is slow
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        assert sound(64, Settings(64, 32, "softmax", int8=False), True, dtype) is together


def sound(
    width: int, settings: Settings, is_differentiated: bool, dtype: torch.dtype = BF16
) -> Callable[..., Tensor]:
    """The answer for this machine, asked anew."""
    return _sound.__wrapped__(torch.device(DEVICE), dtype, width, settings, is_differentiated)


@pytest.mark.parametrize(("dtype", "int8"), [(FP32, False), (BF16, False), (BF16, True)])
def test_the_sum_is_the_same_whatever_runs(dtype: torch.dtype, int8: bool) -> None:
    settings = Settings(128, 64, "elu", int8)
    inputs = draw(Case(130, 150, 2, 64), settings, dtype)
    q, k, v, index, weight, bias = inputs
    sizes = {"block_q": 128, "block_k": 64}
    got = sparse_linear_attention(q, k, v, index, "elu", weight, bias, **sizes, int8=int8)
    assert got.dtype == dtype
    # as test_one_kernel_is_no_worse_than_two
    truth = truth_of(inputs, settings)
    assert error(got, truth) <= 1.1 * error(separate(*inputs, settings), truth)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_gradients_of_one_backward_are_no_worse_than_those_of_two(feature_map: str) -> None:
    settings = Settings(64, 64, feature_map, int8=False)
    q, k, v, index, weight, bias = draw(Case(130, 150, 2, 64), settings)
    grad = torch.randn_like(q)

    def of(form: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        def call(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return form(q, k, v, index, weight, bias, settings)

        return differentiate(call, inputs, grad.to(inputs[0].dtype))

    def twin(*inputs: object) -> Tensor:
        return truth_of([*inputs[:-1]], settings)

    inputs = [q, k, v, weight, bias]
    truth = of(twin, [x.double() for x in inputs])
    for got, two, true in zip(of(together, inputs), of(separate, inputs), truth, strict=True):
        # one rounding less; a tenth is luck
        assert error(got, true) <= 1.1 * error(two, true)


def test_what_is_not_asked_for_has_no_gradient() -> None:
    settings = Settings(64, 64, "softmax", int8=False)
    q, k, v, index, weight, bias = draw(Case(65, 70, 1, 64), settings)
    leaf = q.detach().requires_grad_()
    together(leaf, k, v, index, weight, bias, settings).sum().backward()
    assert leaf.grad.abs().sum() > 0
    assert all(x.grad is None for x in (k, v, weight, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_map": "hedgehog"}, "feature_map='hedgehog'"),
        ({"weight": torch.zeros(32, 64)}, "got weight"),
        ({"block_q": 64}, "for blocks of 64 queries"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    q, k, v, index, weight, bias = draw(Case(130, 150, 2, 64), SETTINGS[0])
    given = {"feature_map": "softmax", "weight": weight, "bias": bias, "block_q": 128, "block_k": 64}
    with pytest.raises(ValueError, match=message):
        sparse_linear_attention(q, k, v, index, **given | change)
