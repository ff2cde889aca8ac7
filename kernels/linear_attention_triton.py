"""Triton kernels of kernels/linear_attention.py: f(q) (f(k)^T v) W^T / (1e-5 + f(q) sum f(k)) + bias, fused.

Every tensor lies in memory tokens first, (B, L, N, D), as the model's projections leave it.  A program owns
one head and a span of tokens.  What a head must know of its keys, the state f(k)^T v (D, D) and the mass
sum f(k) (D), is added up from the spans' parts in a fixed order.

Rows of outputs are averages of values, often nearly the same one.  So the head's mean value is taken out of
the state before that is rounded to 16 bits, and features are rounded once, alike above and below the line:
what is left after subtraction, in gradients above all, is exact relative to its own size.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.tiles import LOG2E, head_start, load_rows, store_rows, tokens_first

HEAD_WIDTHS = (64, 128)
DTYPES = (torch.bfloat16, torch.float32)
EPS = tl.constexpr(reference.LINEAR_EPS)
# one compilation for every length, 1 included
LENGTHS = ("L", "S", "N", "span", "parts", "heads")


class Tile(NamedTuple):
    """Tokens a program holds at once, its warps, stages of its load pipeline, most registers of a thread.

    programs: on a multiprocessor, each with its own part of a state: more read longer to add the parts.
    """

    tokens: int
    warps: int
    stages: int
    registers: int | None = None
    programs: int = 2


class Branch(NamedTuple):
    """What an output is computed from: queries (B, L, N, D), what fold says of keys, and bias (D)."""

    q: Tensor
    folded: Tensor
    vectors: Tensor
    bias: Tensor
    feature_map: str


# made for D = 128 in 16 bits; tests/kernels/test_linear_attention_compile.py holds them to every GPU
PORTABLE = {
    "state": Tile(32, 8, 3, 128),
    "output": Tile(32, 4, 2, programs=4),
    "query_grad": Tile(32, 8, 2, programs=4),
    "state_grad": Tile(32, 8, 3, 128),
    "key_grad": Tile(32, 8, 1, programs=4),
    "state_tangent": Tile(32, 8, 2, programs=1),
    "output_tangent": Tile(32, 8, 1, programs=4),
}
# 64 rows are what a warp group of Hopper's multiplies at once: fewer barriers for a token
HOPPER = PORTABLE | {
    "state": Tile(64, 4, 3),
    "output": Tile(64, 4, 2, programs=4),
    "query_grad": Tile(64, 4, 2, programs=4),
    "key_grad": Tile(64, 8, 3, programs=4),
    "state_tangent": Tile(64, 8, 3, programs=1),
    "output_tangent": Tile(64, 4, 1, programs=4),
}
# exact fp32 products are no work for tensor cores; for tests and not for speed
FP32_TILE = Tile(16, 8, 1)
# rows of a state that a program of fold_kernel adds up, columns, and parts at once
FOLD_ROWS, FOLD_COLUMNS, FOLD_PARTS = 16, 64, 8
# columns of the narrowest matrix that tensor cores multiply with
NARROW = tl.constexpr(16)


def tile_for(kind: str, dtype: torch.dtype, capability: int) -> Tile:
    """The tile of a kernel, a key of PORTABLE, on a GPU of a capability, 90 for 9.0."""
    if dtype == torch.float32:
        return FP32_TILE
    return (HOPPER if capability == 90 else PORTABLE)[kind]


def options(tile: Tile, head_dim: int, dtype: torch.dtype, feature_map: str) -> dict[str, int | str | None]:
    """The compile-time arguments and launch options of the kernels that walk along tokens."""
    return {
        "D": head_dim,
        "TOKENS": tile.tokens,
        "STAGES": tile.stages,
        "MAP": feature_map,
        "DOT": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": tile.registers,
    }


@triton.jit
def features(x, MAP: tl.constexpr):
    """reference.FEATURE_MAPS of rows [TOKENS, D], in fp32."""
    x = x.to(tl.float32)
    if MAP == "softmax":
        x = tl.exp2(x * LOG2E - (tl.max(x, 1) * LOG2E)[:, None])
        x = x * (1 / tl.sum(x, 1))[:, None]
    elif MAP == "elu":
        x = tl.where(x > 0, x + 1, tl.exp2(tl.minimum(x, 0) * LOG2E))
    else:
        x = tl.where(x < 0, 0.0, x)
    return x


@triton.jit
def derivative(x, f, along, MAP: tl.constexpr):
    """The tangent of the features f of x from that of x, or the gradient of x from theirs: they are alike."""
    if MAP == "softmax":
        along = f * (along - tl.sum(f * along, 1)[:, None])
    elif MAP == "elu":
        along = tl.where(x > 0, along, f * along)
    else:
        along = tl.where(x > 0, along, 0.0)
    return along


@triton.jit
def square(ptr, D: tl.constexpr):
    """Pointers to a matrix [D, D]."""
    row = tl.arange(0, D)
    return ptr + row[:, None] * D + row[None, :]


@triton.jit
def thirds(x, column, dtype: tl.constexpr):
    """A matrix [rows, NARROW], zero but for three columns from `column` on, whose sum is the fp32 x [rows].

    So that f(q) x is a product in 16 bits that lies like the product beside it, and exact in x.
    """
    high = x.to(dtype)
    rest = x - high.to(tl.float32)
    middle = rest.to(dtype)
    low = (rest - middle.to(tl.float32)).to(dtype)
    place = tl.arange(0, NARROW)[None, :] - column
    matrix = tl.where(place == 0, high[:, None], tl.where(place == 1, middle[:, None], low[:, None]))
    return tl.where((place >= 0) & (place < 3), matrix, 0.0).to(dtype)


@triton.jit
def count_rows(first, count, TOKENS: tl.constexpr, dtype: tl.constexpr):
    """[TOKENS, NARROW], whose columns add up to one in the rows that there are, to zero below the end."""
    there = tl.broadcast_to((first + tl.arange(0, TOKENS) < count)[:, None], [TOKENS, NARROW])
    return tl.where(there, 1 / NARROW, 0.0).to(dtype)


@triton.jit
def store_part(parts_ptr, part, state, mass, D: tl.constexpr):
    """A program's part (D + 2, D): state, mass, and the state summed over features, which gives the mean.

    mass [D, NARROW]: in columns that add up to it.
    """
    ptr = parts_ptr + part.to(tl.int64) * ((D + 2) * D)
    tl.store(square(ptr, D), state)
    tl.store(ptr + D * D + tl.arange(0, D), tl.sum(mass, 1))
    tl.store(ptr + (D + 1) * D + tl.arange(0, D), tl.sum(state, 0))


@triton.jit(do_not_specialize=LENGTHS)
def state_kernel(
    k_ptr, v_ptr, parts_ptr, S, N, span,
    D: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Parts of the state f(k)^T v and the mass sum f(k) of every head."""
    head = tl.program_id(0).to(tl.int64)
    stride = N * D
    offset = head_start(head, S, N, D)
    state = tl.zeros([D, D], tl.float32)
    mass = tl.zeros([D, NARROW], tl.float32)
    first = tl.program_id(1) * span
    for key in tl.range(first, tl.minimum(first + span, S), TOKENS, num_stages=STAGES):
        # rows below the end are zero in v, and so add nothing to the state
        k = load_rows(k_ptr + offset, key, S, stride, D, TOKENS)
        v = load_rows(v_ptr + offset, key, S, stride, D, TOKENS)
        f = features(k, MAP).to(k.dtype)
        state = tl.dot(f.T, v, state, input_precision=DOT)
        mass = tl.dot(f.T, count_rows(key, S, TOKENS, k.dtype), mass, input_precision=DOT)
    store_part(parts_ptr, tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), state, mass, D)


@triton.jit
def _add_up(ptr, parts, step, PARTS: tl.constexpr):
    """The sum of blocks that lie `step` apart: PARTS loads are under way at once, as each takes long."""
    total = tl.zeros(ptr.shape, tl.float32)
    for first in range(0, parts, PARTS):
        for part in tl.static_range(PARTS):
            total += tl.load(ptr + (first + part) * step, mask=first + part < parts, other=0.0)
    return total


@triton.jit(do_not_specialize=LENGTHS)
def fold_kernel(
    parts_ptr, weight_ptr, state_ptr, folded_ptr, vectors_ptr, parts, heads,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, FORWARD: tl.constexpr,
):  # fmt: skip
    """Sums over the parts, ROWS rows of one head's state a program, and what they are projected to.

    FORWARD: folded = (state - mass mean^T) W^T and vectors (B N, 3, D) = mass, mean value, mean W^T, all in
    fp32.  Heads from `heads` on are tangents, and have the mean values of those before them: a shift of all
    values alike, which is no part of the derivative.
    Else, of gradients: folded = state W, and vectors the mass alone.
    """
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, D)[None, :]
    step = tl.num_programs(0).to(tl.int64) * ((D + 2) * D)
    mean_ptr = parts_ptr + head % heads * ((D + 2) * D) + D * D
    parts_ptr += head * ((D + 2) * D)
    vectors_ptr += head * (3 * D)
    mass = _add_up(parts_ptr + D * D + row, parts, step, PARTS)
    tl.store(vectors_ptr + row, mass)
    if FORWARD:
        # without any feature there is no mean either
        total = tl.maximum(tl.sum(_add_up(mean_ptr + at, parts, step, PARTS)), 1e-30)
    folded = tl.zeros([ROWS, D], tl.float32)
    shift = tl.zeros([ROWS, D], tl.float32)
    for column in range(0, D, COLUMNS):
        inner = column + tl.arange(0, COLUMNS)[None, :]
        state = _add_up(parts_ptr + row * D + inner, parts, step, PARTS)
        tl.store(state_ptr + head * (D * D) + row * D + inner, state)
        if FORWARD:
            w = tl.load(weight_ptr + at * D + inner.T).to(tl.float32)
            mean = _add_up(mean_ptr + D + inner, parts, step, PARTS) / total
            tl.store(vectors_ptr + D + inner, mean)
            state -= mass * mean
            # every row of it alike
            shift = tl.dot(tl.broadcast_to(mean, [ROWS, COLUMNS]), w, shift, input_precision="ieee")
        else:
            w = tl.load(weight_ptr + inner.T * D + at).to(tl.float32)
        folded = tl.dot(state, w, folded, input_precision="ieee")
    tl.store(folded_ptr + head * (D * D) + row * D + at, folded.to(folded_ptr.dtype.element_ty))
    if FORWARD:
        tl.store(vectors_ptr + 2 * D + at, tl.sum(shift, 0)[None, :] / ROWS)


@triton.jit(do_not_specialize=LENGTHS)
def output_kernel(
    q_ptr, folded_ptr, vectors_ptr, bias_ptr, add_ptr, o_ptr, L, N, span,
    D: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """f(q) state W^T / (1e-5 + f(q) mass) + bias, and + add where add_ptr is given."""
    head = tl.program_id(0).to(tl.int64)
    stride = N * D
    offset = head_start(head, L, N, D)
    folded = tl.load(square(folded_ptr + head * (D * D), D))
    vectors_ptr += head * (3 * D) + tl.arange(0, D)
    mass, shift = thirds(tl.load(vectors_ptr), 0, folded.dtype), tl.load(vectors_ptr + 2 * D)
    bias = tl.load(bias_ptr + tl.arange(0, D)).to(tl.float32)
    first = tl.program_id(1) * span
    # said here, num_stages hold for loads that no product takes, too
    for row in tl.range(first, tl.minimum(first + span, L), TOKENS, num_stages=STAGES):
        q = load_rows(q_ptr + offset, row, L, stride, D, TOKENS)
        f = features(q, MAP).to(q.dtype)
        o = tl.dot(f, folded, input_precision=DOT)
        weight = tl.sum(tl.dot(f, mass, input_precision=DOT), 1)
        inverse = 1 / (EPS + weight)
        o = o * inverse[:, None] + ((weight * inverse)[:, None] * shift[None, :] + bias[None, :])
        if add_ptr is not None:
            o += load_rows(add_ptr + offset, row, L, stride, D, TOKENS).to(tl.float32)
        store_rows(o_ptr + offset, o, row, L, stride, D, TOKENS)


def forward(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, feature_map: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output (B, N, L, D) in q's dtype, and for backward folded, state (B N, D, D) and vectors."""
    q, add = (None if x is None else tokens_first(x) for x in (q, add))
    o = torch.empty_like(q)
    state, folded, vectors = of_keys(k, v, weight, feature_map)
    with torch.cuda.device_of(q):
        Walk(q, "output", feature_map)(output_kernel, q, folded, vectors, bias.contiguous(), add, o)
    return o.transpose(1, 2), folded, state, vectors


def of_keys(k: Tensor, v: Tensor, weight: Tensor, feature_map: str) -> tuple[Tensor, Tensor, Tensor]:
    """What an output needs of k and v (B, N, S, D): state, folded and vectors, as fold gives them."""
    k, v = tokens_first(k), tokens_first(v)
    with torch.cuda.device_of(k):
        walk = Walk(k, "state", feature_map)
        parts = walk.parts()
        walk(state_kernel, k, v, parts)
        return fold(parts, weight, k.dtype)


class Walk:
    """A launch whose programs each walk along a span of the tokens of one head of x (B, L, N, D)."""

    def __init__(self, x: Tensor, kind: str, feature_map: str):
        # the interpreter, on a CPU, has no multiprocessors: as many as make several parts of a short input
        cores, capability = _gpu(x.device) if x.is_cuda else (8, 0)
        tile = tile_for(kind, x.dtype, capability)
        B, L, N, D = x.shape
        tiles = triton.cdiv(triton.cdiv(L, tile.tokens), max(1, tile.programs * cores // (B * N)))
        self.lengths = L, N, tile.tokens * tiles
        self.grid = B * N, triton.cdiv(L, self.lengths[2])
        self.options = options(tile, D, x.dtype, feature_map)
        self.device = x.device

    def parts(self, states: int = 1) -> Tensor:
        """Room for what the programs know of as many states of a head: (programs, states B N, D + 2, D)."""
        heads, count = self.grid
        D = self.options["D"]
        return torch.empty(count, states * heads, D + 2, D, dtype=torch.float32, device=self.device)

    def __call__(self, kernel: triton.JITFunction, *tensors: Tensor | None) -> None:
        kernel[self.grid](*tensors, *self.lengths, **self.options)


@cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Its multiprocessors, and its capability, 90 for 9.0."""
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, 10 * found.major + found.minor


def fold(
    parts: Tensor, weight: Tensor, dtype: torch.dtype, *, states: int = 1, of_gradients: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """What fold_kernel makes of the parts, of as many states of a head: state, folded, vectors."""
    count, heads, _, D = parts.shape
    state = torch.empty(heads, D, D, dtype=torch.float32, device=parts.device)
    folded = torch.empty_like(state, dtype=dtype)
    vectors = torch.empty(heads, 3, D, dtype=torch.float32, device=parts.device)
    fold_kernel[heads, D // FOLD_ROWS](
        parts, weight.contiguous(), state, folded, vectors, count, heads // states,
        D=D, ROWS=FOLD_ROWS, COLUMNS=FOLD_COLUMNS, PARTS=FOLD_PARTS, FORWARD=not of_gradients,
    )  # fmt: skip
    return state, folded, vectors
