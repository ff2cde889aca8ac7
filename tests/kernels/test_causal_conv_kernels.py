"""The Triton kernel of causal convolutions: on a Hopper GPU, or in the interpreter by test_without_gpu.py."""

import pytest
import torch
from torch import Tensor

from kernels import causal_conv as ops
from kernels import causal_conv_triton as kernels
from tests.kernels.judging import DEVICE, GPU, ROUNDINGS, error

OLD = GPU and torch.cuda.get_device_capability()[0] != 9
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(OLD, reason="the kernel is for Hopper"),
]

BF16, FP16 = torch.bfloat16, torch.float16
# channels in and out; of two parts and of one, of several steps, of several programs
CHANNELS = [(96, 96), (64, 192), (160, 32), (192, 384)] if GPU else [(96, 96), (64, 192), (32, 384)]


def draw(C: int, N: int, dtype: torch.dtype, size: tuple[int, ...] = (2, 4, 19, 37)) -> tuple[Tensor, Tensor]:
    """Two samples of two frames and the two before, in sizes of no tile; weights of the usual spread."""
    B, T, H, W = size
    x = torch.randn(B, T, H, W, C).to(DEVICE, dtype).movedim(-1, 1)
    return x, (torch.randn(N, C, 3, 3, 3) / (27 * C) ** 0.5).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("C", "N"), CHANNELS)
def test_it_is_the_convolution(C: int, N: int, dtype: torch.dtype) -> None:
    x, weight = draw(C, N, dtype)
    got, truth = kernels.causal_conv(x, weight), ops.plain(x.double(), weight.double())
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    # every pixel: one left out, or read from beside, is off by as much as it is large
    off = (got.double() - truth).norm(dim=1) / truth.norm(dim=1)
    assert off.max() < 2 * ROUNDINGS[dtype] * torch.finfo(dtype).eps


def test_what_is_not_finite_reaches_its_neighbours_and_no_other() -> None:
    x, weight = draw(32, 32, BF16, (1, 4, 9, 20))
    x[0, 3, 2, 4, 16] = torch.nan
    seen = kernels.causal_conv(x, weight).isnan().any(1).nonzero()
    # of three frames' taps two are there; three rows and columns, over the edge of a tile
    assert seen.amin(0).tolist() == [0, 0, 3, 15]
    assert seen.amax(0).tolist() == [0, 1, 5, 17]
    assert len(seen) == 2 * 3 * 3


@torch.no_grad()
def test_what_is_chosen_is_right() -> None:
    for C, N in ((96, 96), (3, 32), (32, 3)):
        x, weight = draw(C, N, BF16)
        # a rounding of either
        assert error(ops.causal_conv(x, weight), ops.plain(x.double(), weight.double())) < 2 * 2**-8


@pytest.mark.skipif(not GPU, reason="times a GPU")
def test_the_quicker_one_is_chosen() -> None:
    x, weight = draw(32, 32, BF16)

    def slow(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(20):
            y = ops.plain(x, weight)
        return y

    assert ops.faster({slow: 1, ops.plain: 1}, x, weight) is ops.plain
    assert ops.faster({slow: 1000, ops.plain: 1}, x, weight) is slow
