"""The Triton kernels of the linear branch: on a GPU, or in the interpreter by test_without_gpu.py."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from kernels.linear_attention import _sound, fused, linear_attention, plain
from kernels.reference import FEATURE_MAPS, LINEAR_EPS
from tests.kernels.judging import DEVICE, GPU, allowed, widen

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

BF16, FP32 = torch.bfloat16, torch.float32
# queries, keys, width: one token, about two tiles, several parts
SMALL = [(1, 1, 64), (63, 64, 64), (65, 63, 64), (64, 300, 64), (300, 1, 64), (33, 65, 128)]
LARGE = [(1000, 515, 128), (200, 32760, 128), (32760, 200, 128)] * GPU
CASES = [(BF16, size, "softmax") for size in SMALL + LARGE]
CASES += [(dtype, SMALL[2], name) for dtype in (BF16, FP32) for name in FEATURE_MAPS]
CASES += [(FP32, size, "softmax") for size in SMALL[::3] + LARGE[:1]]
# places of what may have a tangent: q, k, v, add
DUAL = (0, 1, 2, 5)
NAMES = ("out", "q", "k", "v", "weight", "bias", "add")


def draw(size: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, weight, bias, add and the gradient of the output; values have a mean, as a network's do."""
    rows, keys, width = size
    tokens = [torch.randn(2, length, 2, width).transpose(1, 2) for length in (rows, keys, keys, rows, rows)]
    q, k, v, add, grad = tokens
    weight, bias = torch.randn(width, width) / width**0.5, torch.randn(width)
    return [x.to(DEVICE, dtype) for x in (q, k, v + 0.5, weight, bias, add, grad)]


def naive(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, feature_map: str
) -> Tensor:
    """By PyTorch's operators, each rounding to the inputs' dtype."""
    q, k = map(FEATURE_MAPS[feature_map], (q, k))
    out = F.linear(q @ (k.mT @ v) / (LINEAR_EPS + q @ k.sum(-2).unsqueeze(-1)), weight, bias)
    return out if add is None else out + add


def linear_attention_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    feature_map: str,
) -> Tensor:
    """The public function, its arguments in the order of its forms."""
    return linear_attention(q, k, v, feature_map, weight, bias, add)


def differentiate(form: Callable[..., Tensor], tensors: list[Tensor], feature_map: str) -> list[Tensor]:
    """The output, and the gradients of all inputs."""
    *inputs, grad = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = form(*inputs, feature_map)
    return [out, *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize(("dtype", "size", "feature_map"), CASES)
def test_output_and_gradients(dtype: torch.dtype, size: tuple[int, int, int], feature_map: str) -> None:
    tensors = draw(size, dtype)
    got = differentiate(fused, tensors, feature_map)
    truth = differentiate(plain, [x.double() for x in tensors], feature_map)
    lost = differentiate(naive, tensors, feature_map)
    # a gradient may all but vanish (one key: that of q and k); what is left is rounding of the others' size
    largest = max(x.norm() for x in truth[1:4])
    for name, ours, naively, true in zip(NAMES, got, lost, truth, strict=True):
        assert ours.dtype == dtype
        size = max(true.norm(), largest * (name in "qkv"))
        assert (ours.double() - true).norm() <= allowed(naively, true, size, dtype), name


def test_a_projection_that_is_not_trained_gets_no_gradient() -> None:
    tensors = draw((65, 63, 64), BF16)
    wanted = differentiate(fused, tensors, "softmax")[1:4]
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    got = torch.autograd.grad(fused(*leaves, *tensors[3:6], "softmax"), leaves, tensors[6])
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def draw_tangents(tensors: list[Tensor]) -> list[Tensor]:
    """Tangents of q, k, v and add."""
    return [torch.randn_like(tensors[place]) for place in DUAL]


def push(
    form: Callable[..., Tensor],
    tensors: list[Tensor],
    tangents: list[Tensor | None],
    feature_map: str = "softmax",
) -> tuple[Tensor, Tensor]:
    """The output, and its tangent along those of q, k, v and add, any of which may be None."""
    inputs = tensors[:6]
    with torch.no_grad(), forward_ad.dual_level():
        for place, tangent in zip(DUAL, tangents, strict=True):
            if tangent is not None:
                inputs[place] = forward_ad.make_dual(inputs[place], tangent)
        return tuple(forward_ad.unpack_dual(form(*inputs, feature_map)))


@pytest.mark.parametrize(("dtype", "size", "feature_map"), CASES)
def test_output_and_tangent(dtype: torch.dtype, size: tuple[int, int, int], feature_map: str) -> None:
    tensors = draw(size, dtype)
    tangents = draw_tangents(tensors)
    got = push(fused, tensors, tangents, feature_map)
    truth = push(plain, widen(tensors), widen(tangents), feature_map)
    lost = push(naive, tensors, tangents, feature_map)
    for ours, naively, true in zip(got, lost, truth, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - true).norm() <= allowed(naively, true, true.norm(), dtype)


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (3,), (0, 2), (1, 3), (0, 1, 2)])
def test_any_tangent_may_be_absent(given: tuple[int, ...]) -> None:
    tensors = draw((33, 70, 64), FP32)
    tangents = [x if i in given else None for i, x in enumerate(draw_tangents(tensors))]
    _, tangent = push(linear_attention_of, tensors, tangents)
    _, truth = push(plain, widen(tensors), widen(tangents))
    _, lost = push(naive, tensors, tangents)
    assert (tangent.double() - truth).norm() <= allowed(lost, truth, truth.norm(), FP32)
    if given != (3,):
        # without anything to add
        tensors[5], tangents[3] = None, None
        _, alone = push(linear_attention_of, tensors, tangents)
        _, truth = push(plain, widen(tensors), widen(tangents))
        assert (alone.double() - truth).norm() <= allowed(lost, truth, truth.norm(), FP32)


def test_tangent_equals_central_differences() -> None:
    tensors = draw((40, 70, 64), FP32)
    tangents = draw_tangents(tensors)
    _, tangent = push(fused, tensors, tangents)
    h = 1e-4
    ahead, behind = (widen(tensors)[:6] for _ in range(2))
    for place, along in zip(DUAL, widen(tangents), strict=True):
        ahead[place] += h * along
        behind[place] -= h * along
    wanted = (plain(*ahead, "softmax") - plain(*behind, "softmax")) / (2 * h)
    # fp64 is wrong by h^2 and 1e-16 / h, the kernel by a few roundings of fp32
    assert (tangent.double() - wanted).norm() <= 1e-6 * wanted.norm()


def test_tangent_survives_values_that_are_nearly_alike() -> None:
    tensors = draw((65, 130, 64), BF16)
    tensors[2] = tensors[2] + 10
    tangents = [*draw_tangents(tensors)[:3], None]
    _, tangent = push(fused, tensors, tangents)
    _, truth = push(plain, widen(tensors), widen(tangents))
    # four roundings: of features, of their tangents, of the states and of the result
    assert (tangent.double() - truth).norm() <= 4 * 2**-9 * truth.norm()


def test_a_graph_may_carry_tangents() -> None:
    tensors = draw((33, 70, 64), BF16)
    *inputs, grad = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    with forward_ad.dual_level():
        duals = [*inputs]
        duals[0] = forward_ad.make_dual(inputs[0], torch.randn_like(inputs[0]))
        out = forward_ad.unpack_dual(fused(*duals, "softmax")).primal
        got = torch.autograd.grad(out, inputs, grad)
    truth = differentiate(plain, widen(tensors), "softmax")[1:]
    lost = differentiate(naive, tensors, "softmax")[1:]
    for ours, naively, true in zip(got, lost, truth, strict=True):
        assert (ours.double() - true).norm() <= allowed(naively, true, true.norm(), BF16)


def test_gradients_survive_values_that_are_nearly_alike() -> None:
    # rows differ by a tenth of what they share, of which each bf16 product alone would lose 2^-9
    tensors = draw((65, 130, 64), BF16)
    tensors[2] = tensors[2] + 10
    got = differentiate(fused, tensors, "softmax")
    truth = differentiate(plain, [x.double() for x in tensors], "softmax")
    for name, ours, true in zip(NAMES, got, truth, strict=True):
        # four roundings, of features, of what is divided, of the state and of the result
        assert (ours.double() - true).norm() <= 4 * 2**-9 * true.norm(), name


def test_untrained_projection_adds_nothing() -> None:
    q, k, v, weight, bias, add, _ = draw((65, 63, 64), BF16)
    assert torch.equal(fused(q, k, v, 0 * weight, 0 * bias, add, "softmax"), add)


def test_what_is_added_may_be_absent_or_wider() -> None:
    q, k, v, weight, bias, add, grad = draw((33, 40, 64), BF16)
    alone = fused(q, k, v, weight, bias, None, "relu").double()
    wide = torch.randn_like(add, dtype=FP32).requires_grad_()
    out = fused(q, k, v, weight, bias, wide, "relu")
    # each of the two is rounded once, at 2^-9 of its size
    assert (out.double() - (alone + wide)).norm() <= 2**-8 * (alone.norm() + out.double().norm())
    assert torch.equal(torch.autograd.grad(out, wide, grad)[0], grad.float())


def test_the_same_bits_every_time_and_in_every_layout() -> None:
    tensors = draw((65, 70, 64), BF16)
    wanted = differentiate(fused, tensors, "elu")
    again = differentiate(fused, tensors, "elu")
    packed = differentiate(fused, [x.contiguous() for x in tensors], "elu")
    tensors[3] = tensors[3].T.contiguous().T
    turned = differentiate(fused, tensors, "elu")
    for results in (again, packed, turned):
        assert all(torch.equal(x, y) for x, y in zip(results, wanted, strict=True))


def test_queries_without_features_get_the_bias() -> None:
    q, k, v, weight, bias, _, _ = draw((5, 40, 64), FP32)
    # keys without any, too: a mass of zero
    for keys in (k, -k.abs()):
        out = fused(-q.abs(), keys, v, weight, bias, None, "relu")
        assert torch.equal(out, bias.expand_as(out))


@pytest.mark.parametrize("place", [3, 4])
def test_a_tangent_of_the_projection_is_pytorchs(place: int) -> None:
    inputs = draw((17, 20, 64), FP32)[:6]
    with torch.no_grad(), forward_ad.dual_level():
        inputs[0] = forward_ad.make_dual(inputs[0], torch.randn_like(inputs[0]))
        inputs[place] = forward_ad.make_dual(inputs[place], torch.randn_like(inputs[place]))
        got = forward_ad.unpack_dual(linear_attention_of(*inputs, "softmax"))
        wanted = forward_ad.unpack_dual(plain(*inputs, "softmax"))
        assert torch.equal(got.primal, wanted.primal)
        assert torch.equal(got.tangent, wanted.tangent)
        with pytest.raises(ValueError, match="no tangent of the projection"):
            fused(*inputs, "softmax")


@pytest.mark.parametrize(("width", "dtype"), [(32, FP32), (64, torch.float64), (64, torch.float16)])
def test_pytorch_takes_what_the_kernels_cannot(width: int, dtype: torch.dtype) -> None:
    q, k, v, weight, bias, add, _ = draw((10, 20, width), dtype)
    got = linear_attention(q, k, v, "softmax", weight, bias, add)
    assert torch.equal(got, plain(q, k, v, weight, bias, add, "softmax"))


def test_the_kernels_take_the_rest() -> None:
    q, k, v, weight, bias, add, _ = draw((10, 20, 64), BF16)
    got = linear_attention(q, k, v, "softmax", weight, bias, add)
    assert torch.equal(got, fused(q, k, v, weight, bias, add, "softmax"))


@pytest.mark.parametrize("is_dual", [False, True])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_the_trial_of_a_machine_accepts_them(feature_map: str, is_dual: bool) -> None:
    # wherever a first call comes from: of a tangent's, from among dual numbers
    mode = forward_ad.dual_level() if is_dual else torch.inference_mode()
    with mode, warnings.catch_warnings():
        warnings.simplefilter("error")  # of a form that was passed over
        assert _sound.__wrapped__(torch.device(DEVICE), BF16, 64, feature_map, is_dual) is fused
