"""Triton kernels of kernels/linear_attention.py: f(q) (f(k)^T v) W^T / (1e-5 + f(q) sum f(k)) + bias, fused.

Every tensor lies in memory tokens first, (B, L, N, D), as the model's projections leave it.  A program owns
one head and a span of tokens.  What a head must know of its keys, the state f(k)^T v (D, D) and the mass
sum f(k) (D), is added up from the spans' parts in a fixed order.

Rows of outputs are averages of values, often nearly the same one.  So the head's mean value is taken out of
the state before that is rounded to 16 bits, and features are rounded once, alike above and below the line:
what is left after subtraction, in gradients above all, is exact relative to its own size.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.tiles import head_start, load_rows, store_rows, tokens_first

HEAD_WIDTHS = (64, 128)
DTYPES = (torch.bfloat16, torch.float32)
EPS = tl.constexpr(reference.LINEAR_EPS)
# one compilation for every length, 1 included
LENGTHS = ("L", "S", "N", "span", "parts")


class Tile(NamedTuple):
    """Tokens a program holds at once, its warps, stages of its load pipeline, most registers of a thread."""

    tokens: int
    warps: int
    stages: int
    registers: int | None = None


# made for D = 128 in 16 bits, within the shared memory of every GPU: tests/kernels/test_sla_parts_compile.py
TILES = {
    "state": Tile(32, 8, 3, 128),
    "output": Tile(32, 8, 3),
    "query_grad": Tile(32, 8, 2),
    "key_grad": Tile(32, 8, 2),
}
# exact fp32 products are no work for tensor cores; for tests and not for speed
FP32_TILE = Tile(16, 8, 1)
# programs on a multiprocessor, each with its own part of a state: more read longer to add the parts
PROGRAMS = 2
# rows of a state that a program of fold_kernel adds up, and columns at once
FOLD_ROWS, FOLD_COLUMNS = 16, 32


def options(kind: str, head_dim: int, dtype: torch.dtype, feature_map: str) -> dict[str, int | str | None]:
    """The compile-time arguments and launch options of the state, output, query_grad or key_grad kernel."""
    exact = dtype == torch.float32
    tile = FP32_TILE if exact else TILES[kind]
    return {
        "D": head_dim,
        "TOKENS": tile.tokens,
        "MAP": feature_map,
        "DOT": "ieee" if exact else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": tile.registers,
    }


@triton.jit
def _features(x, MAP: tl.constexpr):
    """reference.FEATURE_MAPS of rows [TOKENS, D], in fp32."""
    x = x.to(tl.float32)
    if MAP == "softmax":
        x = tl.exp(x - tl.max(x, 1)[:, None])
        x = x / tl.sum(x, 1)[:, None]
    elif MAP == "elu":
        x = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0)))
    else:
        x = tl.where(x < 0, 0.0, x)
    return x


@triton.jit
def _features_grad(x, f, grad, MAP: tl.constexpr):
    """Gradient of x, from that of its features f."""
    if MAP == "softmax":
        grad = f * (grad - tl.sum(f * grad, 1)[:, None])
    elif MAP == "elu":
        grad = tl.where(x > 0, grad, f * grad)
    else:
        grad = tl.where(x > 0, grad, 0.0)
    return grad


@triton.jit
def _square(ptr, D: tl.constexpr):
    """Pointers to a matrix [D, D]."""
    row = tl.arange(0, D)
    return ptr + row[:, None] * D + row[None, :]


@triton.jit
def _store_part(parts_ptr, state, mass, D: tl.constexpr):
    """A program's part (D + 2, D): state, mass, and the state summed over features, which gives the mean."""
    ptr = parts_ptr + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * ((D + 2) * D)
    tl.store(_square(ptr, D), state)
    tl.store(ptr + D * D + tl.arange(0, D), mass)
    tl.store(ptr + (D + 1) * D + tl.arange(0, D), tl.sum(state, 0))


@triton.jit(do_not_specialize=LENGTHS)
def state_kernel(
    k_ptr, v_ptr, parts_ptr, S, N, span,
    D: tl.constexpr, TOKENS: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Parts of the state f(k)^T v and the mass sum f(k) of every head."""
    head = tl.program_id(0).to(tl.int64)
    stride = N * D
    offset = head_start(head, S, N, D)
    state = tl.zeros([D, D], tl.float32)
    mass = tl.zeros([TOKENS, D], tl.float32)
    first = tl.program_id(1) * span
    for key in range(first, tl.minimum(first + span, S), TOKENS):
        k = load_rows(k_ptr + offset, key, S, stride, D, TOKENS)
        v = load_rows(v_ptr + offset, key, S, stride, D, TOKENS)
        f = tl.where((key + tl.arange(0, TOKENS) < S)[:, None], _features(k, MAP), 0.0).to(k.dtype)
        state = tl.dot(f.T, v, state, input_precision=DOT)
        mass += f.to(tl.float32)
    _store_part(parts_ptr, state, tl.sum(mass, 0), D)


@triton.jit(do_not_specialize=LENGTHS)
def fold_kernel(
    parts_ptr, weight_ptr, state_ptr, folded_ptr, vectors_ptr, parts,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FORWARD: tl.constexpr,
):  # fmt: skip
    """Sums over the parts, ROWS rows of one head's state a program, and what they are projected to.

    FORWARD: folded = (state - mass mean^T) W^T and vectors (B N, 3, D) = mass, mean value, mean W^T.
    Else, of gradients: folded = state W, and vectors the mass alone.
    """
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, D)
    parts_ptr += head * ((D + 2) * D)
    step = tl.num_programs(0).to(tl.int64) * ((D + 2) * D)
    vectors_ptr += head * (3 * D)
    mass = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([D], tl.float32)
    for part in range(parts):
        mass += tl.load(parts_ptr + part * step + D * D + row)
        total += tl.load(parts_ptr + part * step + D * D + at)
    tl.store(vectors_ptr + row, mass)
    folded = tl.zeros([ROWS, D], tl.float32)
    shift = tl.zeros([D], tl.float32)
    for column in range(0, D, COLUMNS):
        inner = column + tl.arange(0, COLUMNS)
        place = row[:, None] * D + inner[None, :]
        state = tl.zeros([ROWS, COLUMNS], tl.float32)
        mean = tl.zeros([COLUMNS], tl.float32)
        for part in range(parts):
            state += tl.load(parts_ptr + part * step + place)
            mean += tl.load(parts_ptr + part * step + (D + 1) * D + inner)
        tl.store(state_ptr + head * (D * D) + place, state)
        if FORWARD:
            w = tl.load(weight_ptr + at[None, :] * D + inner[:, None]).to(tl.float32)
            # without any feature there is no mean either
            mean = mean / tl.maximum(tl.sum(total, 0), 1e-30)
            state -= mass[:, None] * mean[None, :]
            shift += tl.sum(mean[:, None] * w, 0)
            tl.store(vectors_ptr + D + inner, mean)
        else:
            w = tl.load(weight_ptr + inner[:, None] * D + at[None, :]).to(tl.float32)
        folded = tl.dot(state, w, folded, input_precision="ieee")
    folded_ptr += head * (D * D)
    tl.store(folded_ptr + row[:, None] * D + at[None, :], folded.to(folded_ptr.dtype.element_ty))
    if FORWARD:
        tl.store(vectors_ptr + 2 * D + at, shift)


@triton.jit(do_not_specialize=LENGTHS)
def output_kernel(
    q_ptr, folded_ptr, vectors_ptr, bias_ptr, add_ptr, o_ptr, L, N, span,
    D: tl.constexpr, TOKENS: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """f(q) state W^T / (1e-5 + f(q) mass) + bias, and + add where add_ptr is given."""
    head = tl.program_id(0).to(tl.int64)
    stride = N * D
    offset = head_start(head, L, N, D)
    folded = tl.load(_square(folded_ptr + head * (D * D), D))
    vectors_ptr += head * (3 * D) + tl.arange(0, D)
    mass, shift = tl.load(vectors_ptr), tl.load(vectors_ptr + 2 * D)
    bias = tl.load(bias_ptr + tl.arange(0, D)).to(tl.float32)
    first = tl.program_id(1) * span
    for row in range(first, tl.minimum(first + span, L), TOKENS):
        q = load_rows(q_ptr + offset, row, L, stride, D, TOKENS)
        f = _features(q, MAP).to(q.dtype)
        weight = tl.sum(f.to(tl.float32) * mass[None, :], 1)
        total = EPS + weight
        o = tl.dot(f, folded, input_precision=DOT) / total[:, None]
        o += (weight / total)[:, None] * shift[None, :] + bias[None, :]
        if add_ptr is not None:
            o += load_rows(add_ptr + offset, row, L, stride, D, TOKENS).to(tl.float32)
        store_rows(o_ptr + offset, o, row, L, stride, D, TOKENS)


@triton.jit(do_not_specialize=LENGTHS)
def query_grad_kernel(
    q_ptr, g_ptr, folded_ptr, vectors_ptr, gq_ptr, parts_ptr, L, N, span,
    D: tl.constexpr, TOKENS: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """From g, the gradient of o: that of q, and parts of those of state W^T and of mass.

    The latter is what it is for values less their mean: as much smaller as key_grad_kernel's other term is.
    """
    head = tl.program_id(0).to(tl.int64)
    stride = N * D
    offset = head_start(head, L, N, D)
    folded = tl.load(_square(folded_ptr + head * (D * D), D))
    vectors_ptr += head * (3 * D) + tl.arange(0, D)
    mass, shift = tl.load(vectors_ptr), tl.load(vectors_ptr + 2 * D)
    g_folded = tl.zeros([D, D], tl.float32)
    g_mass = tl.zeros([TOKENS, D], tl.float32)
    first = tl.program_id(1) * span
    for row in range(first, tl.minimum(first + span, L), TOKENS):
        # rows below the end are zero in g, and so add nothing
        q = load_rows(q_ptr + offset, row, L, stride, D, TOKENS)
        g = load_rows(g_ptr + offset, row, L, stride, D, TOKENS)
        exact = _features(q, MAP)
        f = exact.to(q.dtype)
        total = EPS + tl.sum(f.to(tl.float32) * mass[None, :], 1)
        h = (g.to(tl.float32) / total[:, None]).to(q.dtype)
        g_f = tl.dot(h, folded.T, input_precision=DOT)
        # of all weights of a row in common, of which the mean value has 1 less 1e-5 / total
        common = tl.sum(f.to(tl.float32) * g_f, 1) - EPS * tl.sum(h.to(tl.float32) * shift[None, :], 1)
        common = common / total
        g_f -= common[:, None] * mass[None, :]
        store_rows(gq_ptr + offset, _features_grad(q, exact, g_f, MAP), row, L, stride, D, TOKENS)
        g_folded = tl.dot(f.T, h, g_folded, input_precision=DOT)
        g_mass -= common[:, None] * f.to(tl.float32)
    _store_part(parts_ptr, g_folded, tl.sum(g_mass, 0), D)


@triton.jit(do_not_specialize=LENGTHS)
def key_grad_kernel(
    k_ptr, v_ptr, vectors_ptr, g_state_ptr, g_vectors_ptr, gk_ptr, gv_ptr, S, N, span,
    D: tl.constexpr, TOKENS: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v from those of state and, for values less their mean, of mass."""
    head = tl.program_id(0).to(tl.int64)
    stride = N * D
    offset = head_start(head, S, N, D)
    g_state = tl.load(_square(g_state_ptr + head * (D * D), D))
    mean = tl.load(vectors_ptr + head * (3 * D) + D + tl.arange(0, D))
    g_mass = tl.load(g_vectors_ptr + head * (3 * D) + tl.arange(0, D))
    first = tl.program_id(1) * span
    for key in range(first, tl.minimum(first + span, S), TOKENS):
        k = load_rows(k_ptr + offset, key, S, stride, D, TOKENS)
        v = load_rows(v_ptr + offset, key, S, stride, D, TOKENS)
        exact = _features(k, MAP)
        v = (v.to(tl.float32) - mean[None, :]).to(k.dtype)
        g_f = tl.dot(v, g_state.T, input_precision=DOT) + g_mass[None, :]
        store_rows(gk_ptr + offset, _features_grad(k, exact, g_f, MAP), key, S, stride, D, TOKENS)
        gv = tl.dot(exact.to(k.dtype), g_state, input_precision=DOT)
        store_rows(gv_ptr + offset, gv, key, S, stride, D, TOKENS)


def forward(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, feature_map: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output (B, N, L, D) in q's dtype, and for backward folded, state (B N, D, D) and vectors."""
    q, k, v, add = (None if x is None else tokens_first(x) for x in (q, k, v, add))
    (L, N, D), o = q.shape[1:], torch.empty_like(q)
    with torch.cuda.device_of(q):
        launch = options("state", D, q.dtype, feature_map)
        span, grid, parts = _spans(k, launch["TOKENS"])
        state_kernel[grid](k, v, parts, k.shape[1], N, span, **launch)
        state, folded, vectors = _fold(parts, weight, q.dtype, is_forward=True)
        launch = options("output", D, q.dtype, feature_map)
        span, grid, _ = _spans(q, launch["TOKENS"])
        output_kernel[grid](q, folded, vectors, bias.contiguous(), add, o, L, N, span, **launch)
    return o.transpose(1, 2), folded, state, vectors


def backward(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor,
    folded: Tensor, state: Tensor, vectors: Tensor, grad: Tensor, feature_map: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v in their dtype, and in fp32 of weight and bias, from what forward returned."""
    q, k, v, g = (tokens_first(x) for x in (q, k, v, grad))
    gq, gk, gv = (torch.empty_like(x) for x in (q, k, v))
    L, N, D = q.shape[1:]
    with torch.cuda.device_of(q):
        launch = options("query_grad", D, q.dtype, feature_map)
        span, grid, parts = _spans(q, launch["TOKENS"])
        query_grad_kernel[grid](q, g, folded, vectors, gq, parts, L, N, span, **launch)
        g_folded, g_state, g_vectors = _fold(parts, weight, q.dtype, is_forward=False)
        launch = options("key_grad", D, q.dtype, feature_map)
        span, grid, _ = _spans(k, launch["TOKENS"])
        key_grad_kernel[grid](k, v, vectors, g_state, g_vectors, gk, gv, k.shape[1], N, span, **launch)
    g_weight = g_folded.flatten(0, 1).T @ state.flatten(0, 1)
    g_bias = g.sum((0, 1, 2), dtype=torch.float32)
    return *(x.transpose(1, 2) for x in (gq, gk, gv)), g_weight, g_bias


def _spans(x: Tensor, tokens: int) -> tuple[int, tuple[int, int], Tensor]:
    """For x (B, L, N, D): tokens of a program, the grid, and room for the parts of the programs."""
    B, L, N, D = x.shape
    # the interpreter, on a CPU, has none: as many as make several parts of a short input
    cores = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8
    span = tokens * triton.cdiv(triton.cdiv(L, tokens), max(1, PROGRAMS * cores // (B * N)))
    count = triton.cdiv(L, span)
    return span, (B * N, count), torch.empty(count, B * N, D + 2, D, dtype=torch.float32, device=x.device)


def _fold(
    parts: Tensor, weight: Tensor, dtype: torch.dtype, *, is_forward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What fold_kernel makes of the parts: state, folded, vectors."""
    count, heads, _, D = parts.shape
    state = torch.empty(heads, D, D, dtype=torch.float32, device=parts.device)
    folded = torch.empty_like(state, dtype=dtype)
    vectors = torch.empty(heads, 3, D, dtype=torch.float32, device=parts.device)
    fold_kernel[heads, D // FOLD_ROWS](
        parts, weight.contiguous(), state, folded, vectors, count,
        D=D, ROWS=FOLD_ROWS, COLUMNS=FOLD_COLUMNS, FORWARD=is_forward,
    )  # fmt: skip
    return state, folded, vectors
