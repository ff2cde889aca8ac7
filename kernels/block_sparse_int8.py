"""The attention of kernels/block_sparse.py in 8 bits, for inference.

Scores are products of int8 numbers; values are e4m3 where the GPU multiplies such.  In Triton on a GPU
(kernels/block_sparse_int8_triton.py), by kernels/reference.py on a CPU.
"""

import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from kernels import reference
from kernels.block_sparse import Trial, check, runs_in_triton
from kernels.selftest import error_share, first_sound, poisoned

# half more than the twin loses of normal draws, 0.013 and 0.039 (tests/kernels/test_block_sparse.py): kernels
# round as many numbers, some of them to the other side
ALLOWED = {"int8": 0.02, "e4m3": 0.058}


def sparse_attention_int8(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, *, block_q: int, block_k: int
) -> Tensor:
    """sparse_attention, of the same arguments, by coarser numbers: with int8 scores and e4m3 or exact values.

    Raises ValueError for shapes or dtypes that do not fit each other, and where a derivative is asked for.
    """
    check(q, k, v, block_index, block_q, block_k)
    if are_differentiated(q, k, v):
        raise ValueError("8-bit sparse attention has no derivatives; call it under torch.no_grad()")
    if not _runs_in_triton(q, block_q, block_k):
        sizes = {"block_q": block_q, "block_k": block_k}
        return reference.sparse_attention_int8(q, k, v, block_index, **sizes, fp8=False).to(q.dtype)
    from kernels import block_sparse_int8_triton as kernels

    form = _form(q, block_q, block_k)
    return kernels.attention(q, k, v, kernels.Blocks(block_index, block_q, block_k), form)


def are_differentiated(*tensors: Tensor) -> bool:
    """Whether any of them has a graph or a tangent."""
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return needs_grad or any(unpack_dual(x).tangent is not None for x in tensors)


def is_sound(device: torch.device, dtype: torch.dtype, width: int, block_q: int, block_k: int) -> bool:
    """Whether kernels run there, and are right; if they run and are not, a warning says so."""
    q = torch.empty(0, width, dtype=dtype, device=device)
    if not (q.is_cuda and _runs_in_triton(q, block_q, block_k)):
        return False
    try:
        _sound_form(q.device, dtype, width, block_q, block_k)
    except RuntimeError as error:
        warnings.warn(str(error), stacklevel=2)
        return False
    return True


def _runs_in_triton(q: Tensor, block_q: int, block_k: int) -> bool:
    # 8 bits beside fp32 are for tests alone
    return q.dtype != torch.float32 and runs_in_triton(q, block_q, block_k)


def _form(q: Tensor, block_q: int, block_k: int) -> NamedTuple:
    """How to run the kernels where q is."""
    if q.is_cuda:
        return _sound_form(q.device, q.dtype, q.shape[-1], block_q, block_k)
    from kernels import block_sparse_int8_triton as kernels

    return kernels.forms_for(0, block_q, block_k)[0]


@cache
def _sound_form(
    device: torch.device, dtype: torch.dtype, width: int, block_q: int, block_k: int
) -> NamedTuple:
    """The first form that is right about a small example on that GPU."""
    from kernels import block_sparse_int8_triton as kernels

    major, minor = torch.cuda.get_device_capability(device)
    trial = Trial(device, dtype, width, block_q, block_k)
    forms = kernels.forms_for(10 * major + minor, block_q, block_k)
    named = {str(form): form for form in forms}
    return first_sound("8-bit sparse attention", named, lambda form: share(trial, form))


def share(trial: Trial, form: NamedTuple) -> float:
    """Error of a form of the kernels, as a share of what is allowed it."""
    from kernels import block_sparse_int8_triton as kernels

    blocks = kernels.Blocks(trial.index, trial.block_q, trial.block_k)
    with poisoned():
        o = kernels.attention(trial.q, trial.k, trial.v, blocks, form)
    return error_share((o,), trial.truth()["forward"], ALLOWED["e4m3" if form.fp8 else "int8"])
