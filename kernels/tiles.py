"""What several Triton kernels share: blocks of rows of a matrix, loaded and stored, by pointers or by TMA."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# the first Triton with Gluon as the kernels for Hopper are written in
HAS_GLUON = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def head_start(head, length, N, D: tl.constexpr):
    """Where the rows of a head begin in (B, length, N, D); head: int64, of B * N."""
    return (head // N * length * N + head % N) * D


@triton.jit
def load_rows(ptr, first, count, stride, D: tl.constexpr, ROWS: tl.constexpr):
    """Rows first .. first + ROWS of a matrix of `count` rows; zeros below its end."""
    row = tl.arange(0, ROWS)
    # one 64-bit base and 32-bit offsets within the block: half the registers of 64-bit offsets
    x_ptr = ptr + first * stride.to(tl.int64) + row[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(x_ptr, mask=(first + row < count)[:, None], other=0.0)  # [ROWS, D]


@triton.jit
def store_rows(ptr, x, first, count, stride, D: tl.constexpr, ROWS: tl.constexpr):
    """The opposite of load_rows, rounded to what ptr points to."""
    row = tl.arange(0, ROWS)
    x_ptr = ptr + first * stride.to(tl.int64) + row[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(x_ptr, x.to(ptr.dtype.element_ty), mask=(first + row < count)[:, None])


@triton.jit
def matrix(ptr, count, stride, D: tl.constexpr, ROWS: tl.constexpr, TMA: tl.constexpr):
    """What load_tile and store_tile take: a descriptor of blocks [ROWS, D] for TMA, else the pointer."""
    if TMA:
        ptr = tl.make_tensor_descriptor(ptr, [count, D], [stride, 1], [ROWS, D])
    return ptr


@triton.jit
def load_tile(x, first, count, stride, D: tl.constexpr, ROWS: tl.constexpr, TMA: tl.constexpr):
    """load_rows of a matrix."""
    return x.load([first, 0]) if TMA else load_rows(x, first, count, stride, D, ROWS)


@triton.jit
def store_tile(y, x, first, count, stride, D: tl.constexpr, ROWS: tl.constexpr, TMA: tl.constexpr):
    """store_rows into a matrix."""
    if TMA:
        y.store([first, 0], x.to(y.dtype))
    else:
        store_rows(y, x, first, count, stride, D, ROWS)


def tokens_first(x: Tensor) -> Tensor:
    """(B, N, L, D) -> contiguous (B, L, N, D): no copy for what the model's projections give."""
    return x.transpose(1, 2).contiguous()


def allow_descriptors(device: torch.device) -> None:
    """Give kernels of this thread that make descriptors the memory that these need."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
