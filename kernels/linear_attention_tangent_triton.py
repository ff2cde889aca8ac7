"""Triton kernels of kernels/linear_attention.py with its tangent, laid out as in linear_attention_triton.py.

With f of queries, h of keys, state S = h^T v, mass z = sum h, t = 1e-5 + f z, and d for a tangent,

    o = f S / t,    do = (df S + f dS - (dt / t) f S) / t,    dS = dh^T v + h^T dv,    dt = df z + f dz.

As there the head's mean value m, here held fixed, is taken out of both states: S - z m^T, dS - dz m^T.  What
do loses by that is dt / t (1e-5 / t) m.  The projection has no tangent.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear_attention_triton import (
    EPS,
    LENGTHS,
    NARROW,
    Walk,
    count_rows,
    derivative,
    features,
    fold,
    square,
    store_part,
    thirds,
)
from kernels.tiles import head_start, load_rows, store_rows, tokens_first


@triton.jit(do_not_specialize=LENGTHS)
def state_tangent_kernel(
    k_ptr, v_ptr, dk_ptr, dv_ptr, parts_ptr, S, N, span,
    D: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Parts of the state and the mass of every head and, as of as many heads more, of their tangents."""
    head = tl.program_id(0).to(tl.int64)
    stride = N * D
    offset = head_start(head, S, N, D)
    state = tl.zeros([D, D], tl.float32)
    d_state = tl.zeros([D, D], tl.float32)
    mass = tl.zeros([D, NARROW], tl.float32)
    d_mass = tl.zeros([D, NARROW], tl.float32)
    first = tl.program_id(1) * span
    for key in tl.range(first, tl.minimum(first + span, S), TOKENS, num_stages=STAGES):
        # rows below the end are zero in v, dv and df, and so add nothing
        k = load_rows(k_ptr + offset, key, S, stride, D, TOKENS)
        dk = load_rows(dk_ptr + offset, key, S, stride, D, TOKENS)
        v = load_rows(v_ptr + offset, key, S, stride, D, TOKENS)
        dv = load_rows(dv_ptr + offset, key, S, stride, D, TOKENS)
        exact = features(k, MAP)
        df = derivative(k, exact, dk.to(tl.float32), MAP).to(k.dtype)
        f = exact.to(k.dtype)
        there = count_rows(key, S, TOKENS, k.dtype)
        state = tl.dot(f.T, v, state, input_precision=DOT)
        d_state = tl.dot(f.T, dv, d_state, input_precision=DOT)
        d_state = tl.dot(df.T, v, d_state, input_precision=DOT)
        mass = tl.dot(f.T, there, mass, input_precision=DOT)
        d_mass = tl.dot(df.T, there, d_mass, input_precision=DOT)
    part = 2 * tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    store_part(parts_ptr, part, state, mass, D)
    store_part(parts_ptr, part + tl.num_programs(0), d_state, d_mass, D)


@triton.jit(do_not_specialize=LENGTHS)
def output_tangent_kernel(
    q_ptr, dq_ptr, folded_ptr, vectors_ptr, bias_ptr, add_ptr, d_add_ptr, o_ptr, do_ptr, L, N, span,
    D: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The output and its tangent; add_ptr and d_add_ptr may be absent."""
    head = tl.program_id(0).to(tl.int64)
    d_head = head + tl.num_programs(0)
    stride = N * D
    offset = head_start(head, L, N, D)
    folded = tl.load(square(folded_ptr + head * (D * D), D))
    d_folded = tl.load(square(folded_ptr + d_head * (D * D), D))
    vectors_ptr += tl.arange(0, D)
    mass = thirds(tl.load(vectors_ptr + head * (3 * D)), 0, folded.dtype)
    # both of f's products at once, in the left and the right half
    masses = mass + thirds(tl.load(vectors_ptr + d_head * (3 * D)), NARROW // 2, folded.dtype)
    is_left = (tl.arange(0, NARROW) < NARROW // 2)[None, :]
    shift = tl.load(vectors_ptr + head * (3 * D) + 2 * D)
    bias = tl.load(bias_ptr + tl.arange(0, D)).to(tl.float32)
    first = tl.program_id(1) * span
    for row in tl.range(first, tl.minimum(first + span, L), TOKENS, num_stages=STAGES):
        q = load_rows(q_ptr + offset, row, L, stride, D, TOKENS)
        dq = load_rows(dq_ptr + offset, row, L, stride, D, TOKENS)
        exact = features(q, MAP)
        df = derivative(q, exact, dq.to(tl.float32), MAP).to(q.dtype)
        f = exact.to(q.dtype)
        weights = tl.dot(f, masses, input_precision=DOT)
        d_weights = tl.dot(df, mass, tl.where(is_left, 0.0, weights), input_precision=DOT)
        weight = tl.sum(tl.where(is_left, weights, 0.0), 1)
        inverse = 1 / (EPS + weight)
        growth = tl.sum(d_weights, 1) * inverse
        o = tl.dot(f, folded, input_precision=DOT)
        do = o * -growth[:, None]
        # o is done with before do is: there are not registers enough for both and their operands
        o = o * inverse[:, None] + ((weight * inverse)[:, None] * shift[None, :] + bias[None, :])
        if add_ptr is not None:
            o += load_rows(add_ptr + offset, row, L, stride, D, TOKENS).to(tl.float32)
        store_rows(o_ptr + offset, o, row, L, stride, D, TOKENS)
        do = tl.dot(f, d_folded, do, input_precision=DOT)
        do = tl.dot(df, folded, do, input_precision=DOT)
        do = do * inverse[:, None] + (growth * (EPS * inverse))[:, None] * shift[None, :]
        if d_add_ptr is not None:
            do += load_rows(d_add_ptr + offset, row, L, stride, D, TOKENS).to(tl.float32)
        store_rows(do_ptr + offset, do, row, L, stride, D, TOKENS)


def tangent(
    primals: tuple[Tensor, Tensor, Tensor], tangents: tuple[Tensor, Tensor, Tensor],
    weight: Tensor, bias: Tensor, add: Tensor | None, d_add: Tensor | None, feature_map: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What linear_attention_triton.forward gives, and the output's tangent along those of q, k, v, add."""
    q, k, v, dq, dk, dv, add, d_add = (
        None if x is None else tokens_first(x) for x in (*primals, *tangents, add, d_add)
    )
    o, do = torch.empty_like(q), torch.empty_like(q)
    with torch.cuda.device_of(q):
        walk = Walk(k, "state_tangent", feature_map)
        parts = walk.parts(2)
        walk(state_tangent_kernel, k, v, dk, dv, parts)
        state, folded, vectors = fold(parts, weight, q.dtype, states=2)
        given = (q, dq, folded, vectors, bias.contiguous(), add, d_add, o, do)
        Walk(q, "output_tangent", feature_map)(output_tangent_kernel, *given)
    saved = (x[: len(x) // 2] for x in (folded, state, vectors))
    return o.transpose(1, 2), *saved, do.transpose(1, 2)
