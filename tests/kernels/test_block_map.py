"""The block map's public function: what it refuses, and that a CPU runs the twin."""

import pytest
import torch
from torch.autograd import forward_ad

from kernels import reference
from kernels.block_map import block_map

OPTIONS = {"block_q": 4, "block_k": 3, "ratio": 0.5}


def test_cpu_runs_the_twin() -> None:
    q, k = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 11, 8)
    assert torch.equal(block_map(q, k, **OPTIONS), reference.block_map(q, k, **OPTIONS))


def test_nothing_is_differentiated() -> None:
    q, k = torch.randn(2, 3, 10, 8, requires_grad=True), torch.randn(2, 3, 11, 8)
    with forward_ad.dual_level():
        index = block_map(q, forward_ad.make_dual(k, torch.ones_like(k)), **OPTIONS)
        assert forward_ad.unpack_dual(index).tangent is None
    assert not index.requires_grad


@pytest.mark.parametrize("shape", [(1, 3, 11, 8), (2, 1, 11, 8), (2, 3, 11, 4), (2, 3, 0, 8)])
def test_refuses_keys_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="with q's batch, heads and width"):
        block_map(torch.randn(2, 3, 10, 8), torch.randn(shape), **OPTIONS)
