"""Triton kernels of kernels/block_sparse.py: attention over listed blocks of keys, its tangent and gradients.

Every tensor lies in memory tokens first, (B, L, N, D), as the model's projections leave it.  A program owns
one head and a tile of query rows, and walks the tiles of the key blocks in its list; for the gradients of
keys and values it owns a tile of keys and walks the query blocks that have it in theirs.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear_attention_triton import Branch
from kernels.tiles import (
    HAS_GLUON,
    LN2,
    LOG2E,
    allow_descriptors,
    head_start,
    load_rows,
    load_tile,
    matrix,
    store_rows,
    store_tile,
    tokens_first,
)

# one compilation for every length, 1 included
LENGTHS = ("L", "S", "N", "kept")


class Form(NamedTuple):
    """How a kernel is laid out: query rows and keys of a tile, warps, stages of the load pipeline.

    A tile never exceeds a block.  tma: loads and stores by descriptors.  registers: the most of a thread.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool = False
    registers: int | None = None


# In 16 bits, made for D = 128, best first; tests/kernels/test_block_sparse_compile.py holds them to limits.
# None has tl.range's warp_specialize: Triton 3.6 makes races of it, rarely enough to pass any small trial.
HOPPER = {
    # four programs a multiprocessor, whose products run under each other's exponentials
    "forward": (Form(64, 64, 4, 1, tma=True, registers=128),),
    "tangent": (Form(128, 64, 8, 2, tma=True), Form(64, 32, 4, 2, tma=True)),
    "queries": (Form(64, 64, 4, 2, tma=True),),
    "keys": (Form(64, 64, 4, 2, tma=True),),
}
PORTABLE = {
    "forward": Form(64, 64, 4, 2),
    "tangent": Form(64, 32, 8, 2),
    "queries": Form(64, 32, 4, 2),
    "keys": Form(64, 64, 8, 2),
}
# exact fp32 products are no work for tensor cores; small tiles, for tests and not for speed
FP32 = Form(32, 32, 8, 1)


def forms_for(kind: str, dtype: torch.dtype, capability: int, block_q: int, block_k: int) -> list[NamedTuple]:
    """Forms of a kind of kernel, a key of PORTABLE, for a GPU of a capability, 90 for 9.0; best first.

    Those that are no Form are of the kernel in kernels/block_sparse_hopper.py.
    """
    if dtype == torch.float32:
        return [FP32]
    forms = HOPPER[kind] if capability == 90 else ()
    # the last is cut down to any block
    fitting = [form for form in forms[:-1] if form.rows <= block_q and form.keys <= block_k]
    own = []
    if kind == "forward" and capability == 90 and HAS_GLUON:
        from kernels.block_sparse_hopper import FORMS

        own = [form for rows, form in FORMS.items() if rows == block_q and form.keys >= block_k]
    return [*own, *fitting, *forms[-1:], PORTABLE[kind]]


def options(
    form: Form, head_dim: int, dtype: torch.dtype, block_q: int, block_k: int
) -> dict[str, int | str | None]:
    """The compile-time arguments and launch options of every kernel here."""
    return {
        "D": head_dim,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "ROWS": min(form.rows, block_q),
        "KEYS": min(form.keys, block_k),
        "DOT": "ieee" if dtype == torch.float32 else "tf32",
        "TMA": form.tma,
        "num_warps": form.warps,
        "num_stages": form.stages,
        "maxnreg": form.registers,
    }


@triton.jit
def first_key(list_ptr, tile, BLOCK_K: tl.constexpr, KEYS: tl.constexpr):
    """The first key of a tile, counted along the listed blocks."""
    TILES: tl.constexpr = BLOCK_K // KEYS
    return tl.load(list_ptr + tile // TILES) * BLOCK_K + tile % TILES * KEYS


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, list_ptr, kept, scale, L, S, N,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DOT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """o and the log-sum-exp of a tile of rows."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    stride = N * D
    q_off = head_start(head, L, N, D)
    k_off = head_start(head, S, N, D)
    q_rows = matrix(q_ptr + q_off, L, stride, D, ROWS, TMA)
    k_rows = matrix(k_ptr + k_off, S, stride, D, KEYS, TMA)
    v_rows = matrix(v_ptr + k_off, S, stride, D, KEYS, TMA)
    o_rows = matrix(o_ptr + q_off, L, stride, D, ROWS, TMA)
    list_ptr += (head * tl.cdiv(L, BLOCK_Q) + first // BLOCK_Q) * kept
    q = load_tile(q_rows, first, L, stride, D, ROWS, TMA)
    m = tl.full([ROWS], -float("inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, D], tl.float32)
    for tile in range(0, kept * (BLOCK_K // KEYS)):
        key = first_key(list_ptr, tile, BLOCK_K, KEYS)
        k = load_tile(k_rows, key, S, stride, D, KEYS, TMA)
        s = tl.dot(q, k.T, input_precision=DOT)  # [ROWS, KEYS]
        # a block holds at least one key, in its first tile: m is finite from then on
        s = tl.where((key + tl.arange(0, KEYS) < S)[None, :], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * (scale * LOG2E))
        p = tl.exp2(s * (scale * LOG2E) - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        m = m_new
        l = l * shrink + tl.sum(p, 1)
        v = load_tile(v_rows, key, S, stride, D, KEYS, TMA)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=DOT)
    store_tile(o_rows, o / l[:, None], first, L, stride, D, ROWS, TMA)
    row = first + tl.arange(0, ROWS)
    tl.store(lse_ptr + head * L + row, (m + tl.log2(l)) * LN2, mask=row < L)


@triton.jit(do_not_specialize=LENGTHS)
def tangent_kernel(
    q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, o_ptr, do_ptr, lse_ptr, list_ptr, kept, scale, L, S, N,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DOT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The same with the tangent do of o along dq, dk and dv."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    stride = N * D
    q_off = head_start(head, L, N, D)
    k_off = head_start(head, S, N, D)
    k_rows = matrix(k_ptr + k_off, S, stride, D, KEYS, TMA)
    v_rows = matrix(v_ptr + k_off, S, stride, D, KEYS, TMA)
    dk_rows = matrix(dk_ptr + k_off, S, stride, D, KEYS, TMA)
    dv_rows = matrix(dv_ptr + k_off, S, stride, D, KEYS, TMA)
    list_ptr += (head * tl.cdiv(L, BLOCK_Q) + first // BLOCK_Q) * kept
    q = load_rows(q_ptr + q_off, first, L, stride, D, ROWS)
    dq = load_rows(dq_ptr + q_off, first, L, stride, D, ROWS)
    m = tl.full([ROWS], -float("inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    r = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, D], tl.float32)
    do = tl.zeros([ROWS, D], tl.float32)
    for tile in range(0, kept * (BLOCK_K // KEYS)):
        key = first_key(list_ptr, tile, BLOCK_K, KEYS)
        k = load_tile(k_rows, key, S, stride, D, KEYS, TMA)
        s = tl.dot(q, k.T, input_precision=DOT)  # [ROWS, KEYS]
        ds = tl.dot(dq, k.T, input_precision=DOT)
        dk = load_tile(dk_rows, key, S, stride, D, KEYS, TMA)
        ds = tl.dot(q, dk.T, ds, input_precision=DOT)
        s = tl.where((key + tl.arange(0, KEYS) < S)[None, :], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * (scale * LOG2E))
        p = tl.exp2(s * (scale * LOG2E) - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        m = m_new
        # absent keys were loaded as zeros: ds is 0 where p is, never infinite
        h = p * (ds * scale)
        l = l * shrink + tl.sum(p, 1)
        r = r * shrink + tl.sum(h, 1)
        v = load_tile(v_rows, key, S, stride, D, KEYS, TMA)
        dv = load_tile(dv_rows, key, S, stride, D, KEYS, TMA)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=DOT)
        # p dv and h v are only ever added: one accumulator for both
        do = tl.dot(p.to(v.dtype), dv, do * shrink[:, None], input_precision=DOT)
        do = tl.dot(h.to(v.dtype), v, do, input_precision=DOT)
    o = o / l[:, None]
    store_rows(o_ptr + q_off, o, first, L, stride, D, ROWS)
    store_rows(do_ptr + q_off, do / l[:, None] - (r / l)[:, None] * o, first, L, stride, D, ROWS)
    row = first + tl.arange(0, ROWS)
    tl.store(lse_ptr + head * L + row, (m + tl.log2(l)) * LN2, mask=row < L)


@triton.jit(do_not_specialize=LENGTHS)
def query_grad_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, g_ptr, lse_ptr, delta_ptr, gq_ptr, list_ptr, kept, scale, L, S, N,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DOT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries from g, the gradient of o, and delta = rowsum(g * o) for the keys'."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    stride = N * D
    q_off = head_start(head, L, N, D)
    k_off = head_start(head, S, N, D)
    k_rows = matrix(k_ptr + k_off, S, stride, D, KEYS, TMA)
    v_rows = matrix(v_ptr + k_off, S, stride, D, KEYS, TMA)
    list_ptr += (head * tl.cdiv(L, BLOCK_Q) + first // BLOCK_Q) * kept
    row = first + tl.arange(0, ROWS)
    g = load_rows(g_ptr + q_off, first, L, stride, D, ROWS)
    o = load_rows(o_ptr + q_off, first, L, stride, D, ROWS)
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + head * L + row, delta, mask=row < L)
    q = load_rows(q_ptr + q_off, first, L, stride, D, ROWS)
    lse = tl.load(lse_ptr + head * L + row, mask=row < L, other=0.0)
    gq = tl.zeros([ROWS, D], tl.float32)
    for tile in range(0, kept * (BLOCK_K // KEYS)):
        key = first_key(list_ptr, tile, BLOCK_K, KEYS)
        k = load_tile(k_rows, key, S, stride, D, KEYS, TMA)
        v = load_tile(v_rows, key, S, stride, D, KEYS, TMA)
        s = tl.dot(q, k.T, input_precision=DOT)  # [ROWS, KEYS]
        # without the mask exp2(-lse) of an absent key may be infinite, and infinity times its zero is NaN
        s = tl.where((key + tl.arange(0, KEYS) < S)[None, :], s, -float("inf"))
        p = tl.exp2(s * (scale * LOG2E) - lse[:, None] * LOG2E)
        ds = p * (tl.dot(g, v.T, input_precision=DOT) - delta[:, None])
        gq = tl.dot(ds.to(k.dtype), k, gq, input_precision=DOT)
    store_rows(gq_ptr + q_off, gq * scale, first, L, stride, D, ROWS)


@triton.jit(do_not_specialize=LENGTHS)
def key_grad_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, delta_ptr, gk_ptr, gv_ptr, list_ptr, starts_ptr, scale, L, S, N,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DOT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, by the transposed list."""
    first = tl.program_id(0) * KEYS
    head = tl.program_id(1).to(tl.int64)
    stride = N * D
    q_off = head_start(head, L, N, D)
    k_off = head_start(head, S, N, D)
    q_rows = matrix(q_ptr + q_off, L, stride, D, ROWS, TMA)
    g_rows = matrix(g_ptr + q_off, L, stride, D, ROWS, TMA)
    k = load_rows(k_ptr + k_off, first, S, stride, D, KEYS)
    v = load_rows(v_ptr + k_off, first, S, stride, D, KEYS)
    gk = tl.zeros([KEYS, D], tl.float32)
    gv = tl.zeros([KEYS, D], tl.float32)
    TILES: tl.constexpr = BLOCK_Q // ROWS
    starts_ptr += head * tl.cdiv(S, BLOCK_K) + first // BLOCK_K
    end = tl.load(starts_ptr + 1) * TILES
    for tile in range(tl.load(starts_ptr) * TILES, end):
        start = tl.load(list_ptr + tile // TILES) * BLOCK_Q + tile % TILES * ROWS
        # rows below the end are zero in q, g, lse and delta, and so add nothing; keys past it are not stored
        q = load_tile(q_rows, start, L, stride, D, ROWS, TMA)
        g = load_tile(g_rows, start, L, stride, D, ROWS, TMA)
        row = start + tl.arange(0, ROWS)
        lse = tl.load(lse_ptr + head * L + row, mask=row < L, other=0.0)
        delta = tl.load(delta_ptr + head * L + row, mask=row < L, other=0.0)
        s = tl.dot(k, q.T, input_precision=DOT)  # [KEYS, ROWS]
        p = tl.exp2(s * (scale * LOG2E) - lse[None, :] * LOG2E)
        gv = tl.dot(p.to(g.dtype), g, gv, input_precision=DOT)
        ds = p * (tl.dot(v, g.T, input_precision=DOT) - delta[None, :])
        gk = tl.dot(ds.to(q.dtype), q, gk, input_precision=DOT)
    store_rows(gk_ptr + k_off, gk * scale, first, S, stride, D, KEYS)
    store_rows(gv_ptr + k_off, gv, first, S, stride, D, KEYS)


class Blocks(NamedTuple):
    """Which keys each query attends to: index (B, N, query blocks, kept), int32, and the sizes of blocks."""

    index: Tensor
    q: int
    k: int


def attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, form: NamedTuple, branch: Branch | None = None
) -> tuple[Tensor, Tensor | None]:
    """o (B, N, L, D) in q's dtype, tokens first in memory, and lse (B, N, L), fp32.

    branch: added to o by forms that are no Form; lse then is None.
    """
    q, k, v = (tokens_first(x) for x in (q, k, v))
    o, lse = torch.empty_like(q), _row_numbers(q) if branch is None else None
    if isinstance(form, Form):
        _launch(forward_kernel, form, blocks, (q, k, v, o, lse), _listed(blocks))
    else:
        from kernels import block_sparse_hopper

        tensors, index = (q, k, v, o), blocks.index.contiguous()
        with torch.cuda.device_of(q):
            block_sparse_hopper.launch(tensors, lse, branch, index, *blocks[1:], form)
    return o.transpose(1, 2), lse


def tangent(
    primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], blocks: Blocks, form: Form
) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse, and the tangent of o along the tangents of q, k and v."""
    inputs = [tokens_first(x) for x in (*primals, *tangents)]
    q = inputs[0]
    o, do, lse = torch.empty_like(q), torch.empty_like(q), _row_numbers(q)
    _launch(tangent_kernel, form, blocks, (*inputs, o, do, lse), _listed(blocks))
    return o.transpose(1, 2), lse, do.transpose(1, 2)


def backward(
    saved: tuple[Tensor, ...], grad: Tensor, blocks: Blocks, form_of_queries: Form, form_of_keys: Form
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients along q, k and v, from grad, that of o; saved: q, k, v, o and lse."""
    q, k, v, o, g = (tokens_first(x) for x in (*saved[:4], grad))
    lse, delta = saved[4], _row_numbers(q)
    gq, gk, gv = (torch.empty_like(x) for x in (q, k, v))
    # leaves delta for the kernel of the keys
    _launch(query_grad_kernel, form_of_queries, blocks, (q, k, v, o, g, lse, delta, gq), _listed(blocks))
    lists = transposed(blocks.index, triton.cdiv(k.shape[1], blocks.k))
    _launch(key_grad_kernel, form_of_keys, blocks, (q, k, v, g, lse, delta, gk, gv), lists)
    return gq.transpose(1, 2), gk.transpose(1, 2), gv.transpose(1, 2)


def transposed(index: Tensor, key_blocks: int) -> tuple[Tensor, Tensor]:
    """The query blocks that list each key block, without waiting for the GPU.

    index (B, N, query blocks, kept) -> query blocks (B * N * query blocks * kept,), ascending for each key
    block of each head in turn, and where those of a key block start (B * N * key_blocks + 1,), all int32.
    """
    (B, N, Q, kept), device = index.shape, index.device
    heads = torch.arange(0, B * N * key_blocks, key_blocks, dtype=torch.int32, device=device)
    keys, order = (index + heads.view(B, N, 1, 1)).flatten().sort(stable=True)
    every = torch.arange(B * N * key_blocks + 1, dtype=torch.int32, device=device)
    return (order // kept % Q).to(torch.int32), torch.searchsorted(keys, every, out_int32=True)


def _launch(
    kernel: triton.JITFunction,
    form: Form,
    blocks: Blocks,
    tensors: tuple[Tensor, ...],
    lists: tuple[Tensor, int | Tensor],
) -> None:
    """A program for every tile of queries, or of keys, of every head; tensors: q, k, then others."""
    q, k = tensors[:2]
    (B, L, N, D), S = q.shape, k.shape[1]
    launch = options(form, D, q.dtype, blocks.q, blocks.k)
    tiles = triton.cdiv(S, launch["KEYS"]) if kernel is key_grad_kernel else triton.cdiv(L, launch["ROWS"])
    with torch.cuda.device_of(q):
        if form.tma:
            allow_descriptors(q.device)
        kernel[tiles, B * N](*tensors, *lists, 1 / math.sqrt(D), L, S, N, **launch)


def _listed(blocks: Blocks) -> tuple[Tensor, int]:
    return blocks.index.contiguous(), blocks.index.shape[-1]


def _row_numbers(x: Tensor) -> Tensor:
    """(B, L, N, D) -> one unwritten fp32 number a row, (B, N, L)."""
    return torch.empty(x.shape[0], x.shape[2], x.shape[1], dtype=torch.float32, device=x.device)
