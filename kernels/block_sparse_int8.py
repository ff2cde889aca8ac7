"""The attention of kernels/block_sparse.py in 8 bits, for inference.

Scores are products of int8 numbers; values are e4m3 where the GPU multiplies such.  In Triton on a GPU
(kernels/block_sparse_int8_triton.py), by kernels/reference.py on a CPU.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from kernels import reference
from kernels.block_sparse import Trial, check, runs_in_triton
from kernels.selftest import error_share, first_sound, poisoned


def sparse_attention_int8(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, *, block_q: int, block_k: int
) -> Tensor:
    """sparse_attention, of the same arguments, by coarser numbers: with int8 scores and e4m3 or exact values.

    Raises ValueError for shapes or dtypes that do not fit each other, and where a derivative is asked for.
    """
    check(q, k, v, block_index, block_q, block_k)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if needs_grad or any(unpack_dual(x).tangent is not None for x in (q, k, v)):
        raise ValueError("8-bit sparse attention has no derivatives; call it under torch.no_grad()")
    if q.dtype == torch.float32 or not runs_in_triton(q, block_q, block_k):
        sizes = {"block_q": block_q, "block_k": block_k}
        return reference.sparse_attention_int8(q, k, v, block_index, **sizes, fp8=False).to(q.dtype)
    from kernels import block_sparse_int8_triton as kernels

    form = _form(q, block_q, block_k)
    return kernels.attention(q, k, v, kernels.Blocks(block_index, block_q, block_k), form)


def _form(q: Tensor, block_q: int, block_k: int) -> NamedTuple:
    """How to run the kernels where q is."""
    if q.is_cuda:
        return _sound_form(q.device, q.dtype, q.shape[-1], block_q, block_k)
    from kernels import block_sparse_int8_triton as kernels

    return kernels.forms_for(0)[0]


@cache
def _sound_form(
    device: torch.device, dtype: torch.dtype, width: int, block_q: int, block_k: int
) -> NamedTuple:
    """The first form that is right about a small example on that GPU."""
    from kernels import block_sparse_int8_triton as kernels

    major, minor = torch.cuda.get_device_capability(device)
    trial = Trial(device, dtype, width, block_q, block_k)
    truth = trial.truth()["forward"]
    inputs = (trial.q, trial.k, trial.v)

    def share(form: NamedTuple) -> float:
        sizes = {"block_q": block_q, "block_k": block_k}
        twin = reference.sparse_attention_int8(*inputs, trial.index, **sizes, fp8=form.fp8)
        with poisoned():
            got = kernels.attention(*inputs, kernels.Blocks(trial.index, block_q, block_k), form)
        # what is rounded the twin rounds too, but for the last digits of what the kernel sums and returns
        return error_share((got,), truth, 1.0) / error_share((twin,), truth, 1.5)

    forms = {str(form): form for form in kernels.forms_for(10 * major + minor)}
    return first_sound("8-bit sparse attention", forms, share)
