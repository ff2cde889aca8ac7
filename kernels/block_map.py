"""Which blocks of keys a block of queries attends to: Triton on a GPU, else kernels/reference.py."""

import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kernels import reference
from kernels.selftest import first_sound, poisoned


def block_map(q: Tensor, k: Tensor, *, block_q: int, block_k: int, ratio: float) -> Tensor:
    """For each block of queries, the key blocks whose mean key has the largest product with its mean query.

    q (B, N, L, D), k (B, N, S, D) -> indices (B, N, query blocks, kept), int32, ascending, as many as
    reference.kept_blocks says; of equal scores the lower index is kept.  Nothing is differentiated.
    """
    reference.check_shapes(q, k, k)
    q, k = q.detach(), k.detach()
    return _implementation(q, k)(q, k, block_q=block_q, block_k=block_k, ratio=ratio)


def _implementation(q: Tensor, k: Tensor) -> Callable[..., Tensor]:
    """Triton, which only GPU machines have, is imported when it is first needed."""
    if q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        from kernels import block_map_triton

        if block_map_triton.is_supported(q, k):
            return _sound(q.device, q.dtype, q.shape[-1]) if q.is_cuda else block_map_triton.block_map
    return reference.block_map


@cache
def _sound(device: torch.device, dtype: torch.dtype, width: int) -> Callable[..., Tensor]:
    """What to run on that GPU, tried on inputs whose scores are exact and often equal, to the last bit."""
    from kernels import block_map_triton

    generator = torch.Generator(device).manual_seed(0)

    def integers(tokens: int) -> Tensor:
        return torch.randint(-1, 2, (2, 2, tokens, width), generator=generator, device=device)

    def check(form: Callable[..., Tensor]) -> float:
        pattern, tail = integers(3 * 64), integers(16)
        # the mean key is 0 and the last block is half a block: powers of two alone divide
        k = torch.cat([pattern, pattern, -pattern, -pattern, tail, -tail], dim=2)
        q, options = integers(4 * 64 + 32), {"block_q": 64, "block_k": 64, "ratio": 0.4}
        with poisoned():
            index = form(q.to(dtype), k.to(dtype), **options)
        return (
            0.0 if torch.equal(index, reference.block_map(q.double(), k.double(), **options)) else torch.inf
        )

    return first_sound(
        "block map", {"Triton": block_map_triton.block_map, "PyTorch": reference.block_map}, check
    )
