"""The Triton kernels of the block map: on a GPU, or in the interpreter by test_without_gpu.py."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import block_map_triton, reference
from kernels.block_map import _sound, block_map
from tests.kernels.judging import DEVICE, GPU

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# queries, keys, block of queries, block of keys, width: one token, about a block, several and a tail
SMALL = [(1, 1, 64, 64, 64), (63, 64, 64, 64, 64), (64, 65, 64, 64, 64), (65, 63, 64, 64, 64)]
SMALL += [(300, 300, 128, 64, 64), (300, 300, 64, 128, 32), (40, 300, 16, 16, 16), (5, 60, 3, 1, 128)]
LARGE = [(32760, 32760, 64, 64, 128), (32760, 32760, 64, 128, 128), (1000, 75600, 128, 64, 128)] * GPU
CASES = [(*sizes, BF16) for sizes in SMALL + LARGE] + [(*SMALL[4], dtype) for dtype in (FP16, FP32)]


def draw(tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """(B, N, L, D), tokens first in memory, as projections leave them."""
    return torch.randn(2, tokens, 2, width).to(DEVICE, dtype).transpose(1, 2)


def block_means(x: Tensor, size: int) -> Tensor:
    return torch.stack([part.mean(-2) for part in x.double().split(size, dim=-2)], dim=-2)


@pytest.mark.parametrize(("rows", "keys", "block_q", "block_k", "width", "dtype"), CASES)
def test_what_is_kept_scores_no_less_than_what_is_not(
    rows: int, keys: int, block_q: int, block_k: int, width: int, dtype: torch.dtype
) -> None:
    q, k = draw(rows, width, dtype), draw(keys, width, dtype) + 3
    index = block_map_triton.block_map(q, k, block_q=block_q, block_k=block_k, ratio=0.3)
    means_q, means_k = block_means(q, block_q), block_means(k.double() - k[:, :, :1].double(), block_k)
    scores = means_q @ means_k.mT
    blocks = math.ceil(keys / block_k)
    assert index.shape == (2, 2, math.ceil(rows / block_q), reference.kept_blocks(0.3, blocks))
    assert index.dtype == torch.int32
    assert (index.diff(dim=-1) > 0).all()
    assert index.min() >= 0
    assert index.max() < blocks
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index.long(), value=True)
    worst = scores.masked_fill(~kept, torch.inf).amin(-1)
    best = scores.masked_fill(kept, -torch.inf).amax(-1)
    # means and products round a few times at 2^-24 of their terms, and those are at most the product of norms
    near = 2**-20 * (means_q.norm(dim=-1) * means_k.norm(dim=-1).amax(-1, keepdim=True))
    assert (worst >= best - near).all()


@pytest.mark.parametrize(("ratio", "block_q"), [(0.1, 16), (0.4, 16), (0.5, 32), (1.0, 64)])
def test_lists_equal_the_twins_where_scores_are_exact(ratio: float, block_q: int) -> None:
    # small integers, whose mean key is 0, and tails of half a block: powers of two alone divide
    pattern, tail = (torch.randint(-1, 2, (2, 2, tokens, 32)) for tokens in (3 * 16, 4))
    k = torch.cat([pattern, pattern, -pattern, -pattern, tail, -tail], dim=2).to(DEVICE, BF16)
    q = torch.randint(-1, 2, (2, 2, 4 * block_q + block_q // 2, 32)).to(DEVICE, BF16)
    options = {"block_q": block_q, "block_k": 16, "ratio": ratio}
    wanted = reference.block_map(q.double(), k.double(), **options)
    assert torch.equal(block_map_triton.block_map(q, k, **options), wanted)


def test_a_large_mean_of_the_keys_does_not_hide_their_differences() -> None:
    # in fp32 the products 2^24 and 2^24 + 1 are one number: a tie, where the lower index would win
    k = torch.zeros(1, 1, 2, 16, device=DEVICE)
    k[..., 0], k[0, 0, 1, 1] = 2.0**24, 1.0
    q = torch.ones(1, 1, 1, 16, device=DEVICE)
    assert block_map_triton.block_map(q, k, block_q=1, block_k=1, ratio=0.5).item() == 1


@pytest.mark.parametrize("kept", [1, 7, 100])
@pytest.mark.parametrize("blocks", [1, 2, 12, 1182, 2048, 5000])
def test_the_best_of_a_row(blocks: int, kept: int) -> None:
    kept = min(kept, blocks)
    rows = torch.randn(7, blocks)
    rows[1] = rows[1].round()  # many are equal
    rows[2] = 1.5  # all are
    rows[3] = torch.where(rows[3] > 0, 0.0, -0.0)  # so are these
    rows[4, ::3], rows[4, 1::3] = torch.inf, -torch.inf
    rows[5] *= 10 ** torch.empty(blocks).uniform_(-45, 38)
    rows[6, ::2] = -torch.nan
    index = torch.empty(7, kept, dtype=torch.int32, device=DEVICE)
    options = {"WIDTH": 1 << (blocks - 1).bit_length(), "TILE": 16, "num_warps": 4}
    # filled up with what would come first
    filled = torch.nn.functional.pad(rows, (0, -blocks % 16), value=torch.inf).to(DEVICE)
    block_map_triton.select_kernel[(7,)](filled, index, blocks, kept, **options)
    # NaN may come first or last, but once
    rank = np.nan_to_num(-rows[:6].numpy(), neginf=-np.inf, posinf=np.inf).argsort(axis=1, kind="stable")
    np.testing.assert_array_equal(index[:6].cpu(), np.sort(rank[:, :kept], axis=1))
    last = index[6].cpu()
    assert (last.diff() > 0).all()
    assert 0 <= last.min() <= last.max() < blocks


def test_other_layouts() -> None:
    q, k = draw(70, 64, FP32), draw(90, 128, FP32)[..., ::2]
    options = {"block_q": 16, "block_k": 16, "ratio": 0.4}
    wanted = block_map_triton.block_map(q.contiguous(), k.contiguous(), **options)
    assert torch.equal(block_map_triton.block_map(q, k, **options), wanted)


@pytest.mark.parametrize(("width", "dtype"), [(24, FP32), (32, torch.float64)])
def test_the_twin_takes_what_the_kernels_cannot(width: int, dtype: torch.dtype) -> None:
    q, k = draw(10, width, dtype), draw(20, width, dtype)
    options = {"block_q": 4, "block_k": 4, "ratio": 0.5}
    assert torch.equal(block_map(q, k, **options), reference.block_map(q, k, **options))
    q, k = q[..., :16].float(), k[..., :16].float()
    assert torch.equal(block_map(q, k, **options), block_map_triton.block_map(q, k, **options))


def test_the_trial_of_a_machine_accepts_them() -> None:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")  # of a form that was passed over
        assert _sound.__wrapped__(torch.device(DEVICE), BF16, 32) is block_map_triton.block_map
