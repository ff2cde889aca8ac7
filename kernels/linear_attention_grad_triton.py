"""Triton kernels of kernels/linear_attention.py's gradients, laid out as in linear_attention_triton.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear_attention_triton import (
    EPS,
    LENGTHS,
    NARROW,
    Walk,
    derivative,
    features,
    fold,
    square,
    store_part,
    thirds,
)
from kernels.tiles import head_start, load_rows, store_rows, tokens_first


@triton.jit(do_not_specialize=LENGTHS)
def query_grad_kernel(
    q_ptr, g_ptr, folded_ptr, vectors_ptr, more_ptr, gq_ptr, rows_ptr, L, N, span,
    D: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """From g, the gradient of o: that of q and, for state_grad_kernel, two numbers of every row (B N, 2, L).

    Those are 1 / total and the gradient of total, for values less their mean.  more_ptr: of what else is
    added to the gradient, may be absent.
    """
    head = tl.program_id(0).to(tl.int64)
    stride = N * D
    offset = head_start(head, L, N, D)
    rows_ptr += 2 * head * L
    folded = tl.load(square(folded_ptr + head * (D * D), D))
    vectors_ptr += head * (3 * D) + tl.arange(0, D)
    mass = tl.load(vectors_ptr)
    masses = thirds(mass, 0, folded.dtype)
    shifts = thirds(tl.load(vectors_ptr + 2 * D), 0, folded.dtype)
    first = tl.program_id(1) * span
    for row in tl.range(first, tl.minimum(first + span, L), TOKENS, num_stages=STAGES):
        q = load_rows(q_ptr + offset, row, L, stride, D, TOKENS)
        g = load_rows(g_ptr + offset, row, L, stride, D, TOKENS)
        exact = features(q, MAP)
        f = exact.to(q.dtype)
        inverse = 1 / (EPS + tl.sum(tl.dot(f, masses, input_precision=DOT), 1))
        g_shift = tl.sum(tl.dot(g, shifts, input_precision=DOT), 1) * inverse
        g_f = tl.dot(g, folded.T, input_precision=DOT) * inverse[:, None]
        # of all weights of a row in common, of which the mean value has 1 less 1e-5 / total
        g_total = (EPS * g_shift - tl.sum(f.to(tl.float32) * g_f, 1)) * inverse
        g_f += g_total[:, None] * mass[None, :]
        gq = derivative(q, exact, g_f, MAP)
        if more_ptr is not None:
            gq += load_rows(more_ptr + offset, row, L, stride, D, TOKENS).to(tl.float32)
        store_rows(gq_ptr + offset, gq, row, L, stride, D, TOKENS)
        at = row + tl.arange(0, TOKENS)
        tl.store(rows_ptr + at, inverse, mask=at < L)
        tl.store(rows_ptr + L + at, g_total, mask=at < L)


@triton.jit(do_not_specialize=LENGTHS)
def state_grad_kernel(
    q_ptr, g_ptr, rows_ptr, parts_ptr, L, N, span,
    D: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Parts of the gradients of state W^T and of mass, the latter for values less their mean.

    So it is as much smaller as key_grad_kernel's other term is.
    """
    head = tl.program_id(0).to(tl.int64)
    stride = N * D
    offset = head_start(head, L, N, D)
    rows_ptr += 2 * head * L
    g_folded = tl.zeros([D, D], tl.float32)
    g_mass = tl.zeros([D, NARROW], tl.float32)
    first = tl.program_id(1) * span
    for row in tl.range(first, tl.minimum(first + span, L), TOKENS, num_stages=STAGES):
        # rows below the end are zero in g and g_total, and so add nothing
        q = load_rows(q_ptr + offset, row, L, stride, D, TOKENS)
        g = load_rows(g_ptr + offset, row, L, stride, D, TOKENS)
        at = row + tl.arange(0, TOKENS)
        inverse = tl.load(rows_ptr + at, mask=at < L, other=0.0)
        g_total = tl.load(rows_ptr + L + at, mask=at < L, other=0.0)
        f = features(q, MAP).to(q.dtype)
        h = (g.to(tl.float32) * inverse[:, None]).to(q.dtype)
        g_folded = tl.dot(f.T, h, g_folded, input_precision=DOT)
        g_mass = tl.dot(f.T, thirds(g_total, 0, q.dtype), g_mass, input_precision=DOT)
    store_part(parts_ptr, tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), g_folded, g_mass, D)


@triton.jit(do_not_specialize=LENGTHS)
def key_grad_kernel(
    k_ptr, v_ptr, vectors_ptr, g_state_ptr, g_vectors_ptr, more_k_ptr, more_v_ptr, gk_ptr, gv_ptr, S, N, span,
    D: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v from those of state and, for values less their mean, of mass.

    more_k_ptr and more_v_ptr: as more_ptr of query_grad_kernel.
    """
    head = tl.program_id(0).to(tl.int64)
    stride = N * D
    offset = head_start(head, S, N, D)
    g_state = tl.load(square(g_state_ptr + head * (D * D), D))
    mean = tl.load(vectors_ptr + head * (3 * D) + D + tl.arange(0, D))
    g_mass = tl.load(g_vectors_ptr + head * (3 * D) + tl.arange(0, D))
    first = tl.program_id(1) * span
    for key in tl.range(first, tl.minimum(first + span, S), TOKENS, num_stages=STAGES):
        k = load_rows(k_ptr + offset, key, S, stride, D, TOKENS)
        v = load_rows(v_ptr + offset, key, S, stride, D, TOKENS)
        exact = features(k, MAP)
        v = (v.to(tl.float32) - mean[None, :]).to(k.dtype)
        g_f = tl.dot(v, g_state.T, input_precision=DOT) + g_mass[None, :]
        gk = derivative(k, exact, g_f, MAP)
        if more_k_ptr is not None:
            gk += load_rows(more_k_ptr + offset, key, S, stride, D, TOKENS).to(tl.float32)
        store_rows(gk_ptr + offset, gk, key, S, stride, D, TOKENS)
        gv = tl.dot(exact.to(k.dtype), g_state, input_precision=DOT)
        if more_v_ptr is not None:
            gv += load_rows(more_v_ptr + offset, key, S, stride, D, TOKENS).to(tl.float32)
        store_rows(gv_ptr + offset, gv, key, S, stride, D, TOKENS)


def backward(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor,
    folded: Tensor, state: Tensor, vectors: Tensor, grad: Tensor, feature_map: str, is_trained: bool,
    onto: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v in their dtype and, if it is trained, in fp32 of the projection's weight and bias.

    From what forward returned.  onto: other gradients of q, k and v, tokens first in memory, to which these
    are added, in place.
    """
    q, k, v, g = (tokens_first(x) for x in (q, k, v, grad))
    more = (None,) * 3 if onto is None else tuple(tokens_first(x) for x in onto)
    gq, gk, gv = (torch.empty_like(x) for x in (q, k, v)) if onto is None else more
    B, L, N, _ = q.shape
    with torch.cuda.device_of(q):
        rows = q.new_empty(B * N, 2, L, dtype=torch.float32)
        Walk(q, "query_grad", feature_map)(query_grad_kernel, q, g, folded, vectors, more[0], gq, rows)
        walk = Walk(q, "state_grad", feature_map)
        parts = walk.parts()
        walk(state_grad_kernel, q, g, rows, parts)
        g_folded, g_state, g_vectors = fold(parts, weight, q.dtype, of_gradients=True)
        given = (k, v, vectors, g_state, g_vectors, *more[1:], gk, gv)
        Walk(k, "key_grad", feature_map)(key_grad_kernel, *given)
    # head by head: one product of all would run on one multiprocessor
    g_weight = (g_folded.mT @ state).sum(0) if is_trained else None
    g_bias = g.sum((0, 1, 2), dtype=torch.float32) if is_trained else None
    return *(x.transpose(1, 2) for x in (gq, gk, gv)), g_weight, g_bias
