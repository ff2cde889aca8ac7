"""The linear branch's public function: a CPU runs PyTorch, both derivatives, what it refuses."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.linear_attention import linear_attention


def draw(rows: int, keys: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v, weight, bias, add."""
    sizes = [(2, 3, rows, 8), (2, 3, keys, 8), (2, 3, keys, 8), (8, 8), (8,), (2, 3, rows, 8)]
    return tuple(torch.randn(size, dtype=dtype) for size in sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_cpu_runs_the_twin_and_a_linear_layer(feature_map: str, dtype: torch.dtype) -> None:
    q, k, v, weight, bias, add = draw(5, 7, dtype)
    wanted = F.linear(reference.linear_attention(q, k, v, feature_map).to(dtype), weight, bias)
    assert torch.equal(linear_attention(q, k, v, feature_map, weight, bias), wanted)
    # what is added may be wider, as the twin of the sparse branch is
    assert torch.equal(linear_attention(q, k, v, feature_map, weight, bias, add.float()), add + wanted)


def test_both_derivatives_equal_finite_differences() -> None:
    q, k, v, weight, bias, add = (x.requires_grad_() for x in draw(3, 4))
    inputs = (q[:1, :1], k[:1, :1], v[:1, :1], weight, bias, add[:1, :1])
    inputs = tuple(x.detach().requires_grad_() for x in inputs)

    def fn(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, add: Tensor) -> Tensor:
        return linear_attention(q, k, v, "softmax", weight, bias, add)

    assert torch.autograd.gradcheck(fn, inputs, check_forward_ad=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": (2, 1, 7, 8)}, "wanted k like v, with q's batch, heads and width"),
        ({"k": (2, 3, 0, 8), "v": (2, 3, 0, 8)}, "at least one token"),
        ({"weight": (8, 4)}, r"wanted \(8, 8\), \(8,\) and \(2, 3, 5, 8\)"),
        ({"bias": (1,)}, r"got weight \(8, 8\), bias \(1,\), add None"),
        ({"add": (2, 3, 1, 8)}, r"add \(2, 3, 1, 8\); wanted"),
    ],
)
def test_refuses_what_does_not_fit(changed: dict[str, tuple[int, ...]], message: str) -> None:
    given = dict(zip(("q", "k", "v", "weight", "bias"), draw(5, 7), strict=False))
    given |= {name: torch.zeros(size, dtype=torch.float64) for name, size in changed.items()}
    with pytest.raises(ValueError, match=message):
        partial(linear_attention, feature_map="relu")(**given)


def test_refuses_an_unknown_feature_map() -> None:
    q, k, v, weight, bias, _ = draw(5, 7)
    with pytest.raises(ValueError, match="got feature_map='cosine', wanted one of softmax, elu, relu"):
        linear_attention(q, k, v, "cosine", weight, bias)
