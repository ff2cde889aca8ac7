"""Triton kernels of kernels/block_sparse_int8.py: queries and keys to int8, values to e4m3, and attention.

Layouts and lists as in kernels/block_sparse_triton.py, but for e4m3 values, which lie channels first,
(B, N, D, padded S): Hopper multiplies 8-bit numbers only along what is contiguous.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.block_sparse_triton import Blocks, Form, first_key, options
from kernels.reference import E4M3_MAX, TINY
from kernels.tiles import (
    HAS_GLUON,
    LOG2E,
    allow_descriptors,
    head_start,
    load_rows,
    load_tile,
    matrix,
    store_rows,
    tokens_first,
)

LOG2_E4M3_MAX = tl.constexpr(math.log2(E4M3_MAX))
# an integer below 2^22 added to these bits gives the bits of a float: 1.5 * 2^23 and that integer
MAGIC_BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(12582912.0)
# rows of e4m3 values are a multiple of this, as descriptors demand
PADDING = 16


class Eight(NamedTuple):
    """How attention is laid out, and whether its values are e4m3, or else as they come."""

    form: NamedTuple
    fp8: bool


HOPPER = Form(64, 64, 4, 1, tma=True, registers=128)
PORTABLE = Form(128, 64, 8, 2)


def forms_for(capability: int, block_q: int, block_k: int) -> list[Eight]:
    """What runs on a GPU of that capability, 90 for 9.0; best first.

    Those whose form is no Form are of the kernel in kernels/block_sparse_int8_hopper.py.
    """
    own = []
    if capability == 90 and HAS_GLUON:
        from kernels.block_sparse_int8_hopper import FORMS

        own = [Eight(form, True) for blocks, form in FORMS.items() if blocks == (block_q, block_k)]
    # the portable form would be slower on Hopper than attention in bf16
    form = HOPPER if capability == 90 else PORTABLE
    eights = [Eight(form, fp8) for fp8 in (True, False) if capability >= 89 or not fp8]
    return own + eights


@triton.jit(do_not_specialize=("L", "N"))
def quantise_kernel(x_ptr, mean_ptr, y_ptr, step_ptr, L, N, tiny, D: tl.constexpr, ROWS: tl.constexpr):
    """A block of rows, less the mean where one is given, in steps of the 127th of its largest number."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    off = head_start(head, L, N, D)
    x = load_rows(x_ptr + off, first, L, N * D, D, ROWS).to(tl.float32)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + head * D + tl.arange(0, D))
        x = tl.where((first + tl.arange(0, ROWS) < L)[:, None], x - mean[None, :], 0.0)
    step = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), tiny) / 127
    store_rows(y_ptr + off, tl.floor(x / step + 0.5), first, L, N * D, D, ROWS)
    tl.store(step_ptr + head * tl.num_programs(0) + tl.program_id(0), step)


@triton.jit(do_not_specialize=("S", "N", "P"))
def quantise_values_kernel(
    v_ptr, step_ptr, y_ptr, S, N, P, D: tl.constexpr, KEYS: tl.constexpr, PAIRED: tl.constexpr
):
    """A tile of values in steps of their channels', channels first; zeros from S to P.

    PAIRED: of 16 keys the pairs (0, 1), (2, 3), ... lie in the order 0, 4, 1, 5, 2, 6, 3, 7.
    """
    first = tl.program_id(0) * KEYS
    head = tl.program_id(1).to(tl.int64)
    v = load_rows(v_ptr + head_start(head, S, N, D), first, S, N * D, D, KEYS)
    channel = tl.arange(0, D)
    v = v.to(tl.float32) / tl.load(step_ptr + head * D + channel)[None, :]
    key = first + tl.arange(0, KEYS)
    y_ptr += head * D * P + channel[:, None] * P + key[None, :]
    v = v.T
    if PAIRED:
        v = v.reshape(D, KEYS // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(D, KEYS)
    tl.store(y_ptr, v.to(y_ptr.dtype.element_ty), mask=(key < P)[None, :])


@triton.jit
def _columns(ptr, P, D: tl.constexpr, KEYS: tl.constexpr, TMA: tl.constexpr):
    """What _load_columns takes, of values (D, P)."""
    if TMA:
        ptr = tl.make_tensor_descriptor(ptr, [D, P], [P, 1], [D, KEYS])
    return ptr


@triton.jit
def _load_columns(x, first, P, D: tl.constexpr, KEYS: tl.constexpr, TMA: tl.constexpr):
    """Columns first .. first + KEYS; zeros from P."""
    if TMA:
        tile = x.load([0, first])
    else:
        key = (first + tl.arange(0, KEYS))[None, :]
        tile = tl.load(x + tl.arange(0, D)[:, None] * P + key, mask=key < P, other=0.0)
    return tile  # [D, KEYS]


@triton.jit(do_not_specialize=("L", "S", "N", "P", "kept"))
def attention_kernel(
    q_ptr, k_ptr, v_ptr, q_step_ptr, k_step_ptr, v_step_ptr, o_ptr, list_ptr, kept, scale, L, S, N, P,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """o of a tile of rows; v_step_ptr is given with e4m3 values."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    stride = N * D
    q_off = head_start(head, L, N, D)
    k_off = head_start(head, S, N, D)
    q_rows = matrix(q_ptr + q_off, L, stride, D, ROWS, TMA)
    k_rows = matrix(k_ptr + k_off, S, stride, D, KEYS, TMA)
    if v_step_ptr is None:
        v_rows = matrix(v_ptr + k_off, S, stride, D, KEYS, TMA)
    else:
        v_columns = _columns(v_ptr + head * D * P, P, D, KEYS, TMA)
    query_block = head * tl.cdiv(L, BLOCK_Q) + first // BLOCK_Q
    list_ptr += query_block * kept
    k_step_ptr += head * tl.cdiv(S, BLOCK_K)
    q_step = tl.load(q_step_ptr + query_block) * (scale * LOG2E)
    q = load_tile(q_rows, first, L, stride, D, ROWS, TMA)
    m = tl.full([ROWS], -float("inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, D], tl.float32)
    for tile in range(0, kept * (BLOCK_K // KEYS)):
        key = first_key(list_ptr, tile, BLOCK_K, KEYS)
        k = load_tile(k_rows, key, S, stride, D, KEYS, TMA)
        # 127 * 127 * D is below 2^22; converting integers is as slow as exponentials
        s = tl.dot(q, k.T, tl.full([ROWS, KEYS], MAGIC_BITS, tl.int32), out_dtype=tl.int32)
        s = s.to(tl.float32, bitcast=True) - MAGIC  # [ROWS, KEYS]
        s = tl.where((key + tl.arange(0, KEYS) < S)[None, :], s, -float("inf"))
        step = q_step * tl.load(k_step_ptr + key // BLOCK_K)
        m_new = tl.maximum(m, tl.max(s, 1) * step)
        shrink = tl.exp2(m - m_new)
        m = m_new
        if v_step_ptr is None:
            p = tl.exp2(s * step - m_new[:, None])
            v = load_tile(v_rows, key, S, stride, D, KEYS, TMA)
        else:
            # the largest weight of a row is the largest e4m3
            p = tl.exp2(s * step - (m_new - LOG2_E4M3_MAX)[:, None])
            v = _load_columns(v_columns, key, P, D, KEYS, TMA).T
        l = l * shrink + tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None])
    o = o / l[:, None]
    if v_step_ptr is not None:
        o *= tl.load(v_step_ptr + head * D + tl.arange(0, D))[None, :]
    store_rows(o_ptr + q_off, o, first, L, stride, D, ROWS)


class Quantised(NamedTuple):
    """q and k int8, v e4m3 or as it came, in the layouts above, and the steps they count in, fp32."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_step: Tensor
    k_step: Tensor
    v_step: Tensor | None


def quantise(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, fp8: bool, paired: bool = False) -> Quantised:
    """q and k (B, N, L or S, D) by blocks, k less its mean; where fp8, v by channels over the sequence.

    paired: the keys of e4m3 values are in the order of quantise_values_kernel.
    """
    q, k, v = (tokens_first(x) for x in (q, k, v))
    q_int8, q_step = _to_int8(q, None, blocks.q)
    k_int8, k_step = _to_int8(k, k.mean(1, dtype=torch.float32), blocks.k)
    if not fp8:
        return Quantised(q_int8, k_int8, v, q_step, k_step, None)
    (B, S, N, D), padded = v.shape, triton.cdiv(v.shape[1], PADDING) * PADDING
    v_step = torch.linalg.vector_norm(v, torch.inf, dim=1, dtype=torch.float32).clamp(min=TINY) / E4M3_MAX
    v_fp8 = torch.empty(B, N, D, padded, dtype=torch.float8_e4m3fn, device=v.device)
    with torch.cuda.device_of(v):
        quantise_values_kernel[triton.cdiv(padded, 64), B * N](v, v_step, v_fp8, S, N, padded, D, 64, paired)
    return Quantised(q_int8, k_int8, v_fp8, q_step, k_step, v_step)


def attend(x: Quantised, blocks: Blocks, form: NamedTuple, dtype: torch.dtype) -> Tensor:
    """o (B, N, L, D) in that dtype, tokens first in memory."""
    (B, L, N, D), S = x.q.shape, x.k.shape[1]
    o = torch.empty(B, L, N, D, dtype=dtype, device=x.q.device)
    if not isinstance(form, Form):
        from kernels import block_sparse_int8_hopper

        with torch.cuda.device_of(o):
            block_sparse_int8_hopper.launch(x, o, blocks.index.contiguous(), blocks.k, form)
        return o.transpose(1, 2)
    launch = options(form, D, dtype, blocks.q, blocks.k)
    del launch["DOT"]
    lists = (blocks.index.contiguous(), blocks.index.shape[-1])
    with torch.cuda.device_of(o):
        if form.tma:
            allow_descriptors(o.device)
        attention_kernel[triton.cdiv(L, launch["ROWS"]), B * N](
            *x[:6], o, *lists, 1 / math.sqrt(D), L, S, N, x.v.shape[-1], **launch
        )
    return o.transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, eight: Eight) -> Tensor:
    """o (B, N, L, D) in q's dtype, tokens first in memory."""
    quantised = quantise(q, k, v, blocks, eight.fp8, paired=not isinstance(eight.form, Form))
    return attend(quantised, blocks, eight.form, q.dtype)


def _to_int8(x: Tensor, mean: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """(B, L, N, D) -> int8 of that shape, and steps (B, N, blocks)."""
    B, L, N, D = x.shape
    steps = torch.empty(B, N, triton.cdiv(L, block), dtype=torch.float32, device=x.device)
    y = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    with torch.cuda.device_of(x):
        quantise_kernel[steps.shape[2], B * N](x, mean, y, steps, L, N, TINY, D, block, num_warps=8)
    return y, steps
