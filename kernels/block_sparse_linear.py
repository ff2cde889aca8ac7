"""Sparse attention and the linear branch together: in one kernel where there is one, else one by one.

The kernel, for Hopper GPUs and without derivatives, is that of sparse attention, which ends each tile with
its queries' linear branch (kernels/linear_attention_hopper.py): no output is written and read again.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import block_sparse, linear_attention
from kernels.block_sparse import BLOCKS, Trial, sparse_attention
from kernels.block_sparse_int8 import are_differentiated, sparse_attention_int8
from kernels.selftest import error_share, first_sound, poisoned


class Settings(NamedTuple):
    """Sizes of blocks, a name in reference.FEATURE_MAPS, and whether the softmax attention is in 8 bits."""

    block_q: int
    block_k: int
    feature_map: str
    int8: bool


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    feature_map: str,
    weight: Tensor,
    bias: Tensor,
    *,
    block_q: int,
    block_k: int,
    int8: bool = False,
) -> Tensor:
    """sparse_attention, or with int8 sparse_attention_int8, plus linear_attention, of their arguments.

    q (B, N, L, D), k and v (B, N, S, D), block_index (B, N, query blocks, kept), weight (D, D), bias (D) ->
    (B, N, L, D).  Derivatives are those of the two, so there are none with int8.
    """
    block_sparse.check(q, k, v, block_index, block_q, block_k)
    linear_attention.check(q, k, v, weight, bias, None, feature_map)
    settings, form = Settings(block_q, block_k, feature_map, int8), separate
    if q.is_cuda and not are_differentiated(q, k, v, weight, bias) and weight.dtype == bias.dtype == q.dtype:
        form = _sound(q.device, q.dtype, q.shape[-1], settings)
    return form(q, k, v, block_index, weight, bias, settings)


def separate(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, weight: Tensor, bias: Tensor, settings: Settings
) -> Tensor:
    """One by one."""
    block_q, block_k, feature_map, int8 = settings
    attend = sparse_attention_int8 if int8 else sparse_attention
    sparse = attend(q, k, v, block_index, block_q=block_q, block_k=block_k)
    return linear_attention.linear_attention(q, k, v, feature_map, weight, bias, add=sparse)


def fused(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, weight: Tensor, bias: Tensor, settings: Settings
) -> Tensor:
    """By sparse attention's kernels for Hopper; for what `has_kernel` says."""
    from kernels import block_sparse_hopper, block_sparse_int8_hopper
    from kernels import block_sparse_int8_triton as int8
    from kernels import block_sparse_triton as sparse
    from kernels.linear_attention_triton import Branch, of_keys
    from kernels.tiles import tokens_first

    _, folded, vectors = of_keys(k, v, weight, settings.feature_map)
    branch = Branch(tokens_first(q), folded, vectors, bias.contiguous(), settings.feature_map)
    blocks = sparse.Blocks(block_index, *settings[:2])
    if settings.int8:
        form = int8.Eight(block_sparse_int8_hopper.FORMS[settings[:2]], fp8=True)
        return int8.attention(q, k, v, blocks, form, branch)
    return sparse.attention(q, k, v, blocks, block_sparse_hopper.FORMS[settings.block_q], branch)[0]


def has_kernel(device: torch.device, dtype: torch.dtype, width: int, settings: Settings) -> bool:
    """Whether `fused` runs there: with fewer queries a block, two programs share what memory there is."""
    from kernels.linear_attention_triton import HEAD_WIDTHS
    from kernels.tiles import HAS_GLUON

    is_hopper = torch.cuda.get_device_capability(device) == (9, 0) and HAS_GLUON
    fits = settings.block_q == 128 and settings.block_k in ((64,) if settings.int8 else BLOCKS)
    return is_hopper and fits and width in HEAD_WIDTHS and dtype == torch.bfloat16


@cache
def _sound(device: torch.device, dtype: torch.dtype, width: int, settings: Settings) -> Callable[..., Tensor]:
    """What to run on that GPU without derivatives: the kernel, if it is right about a small example."""
    if not has_kernel(device, dtype, width, settings):
        return separate

    def check(form: Callable[..., Tensor]) -> float:
        trial = Trial(device, dtype, width, *settings[:2])
        generator = torch.Generator(device).manual_seed(0)
        sizes = ((width, width), (width,))
        weight, bias = (torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes)
        given = (trial.q, trial.k, trial.v)
        with poisoned(), torch.no_grad():
            got = form(*given, trial.index, weight, bias / 4, settings)
        (sparse,) = trial.truth()["forward"]
        truth = linear_attention.plain(
            *(x.double() for x in (*given, weight, bias / 4)), sparse, settings.feature_map
        )
        # as of the linear branch, the larger part; the smaller may lose 4 % of itself, in 8 bits
        return error_share((got,), (truth,), 0.016)

    return first_sound("sparse-linear attention", {"one kernel": fused, "two kernels": separate}, check)
