"""Triton kernels of kernels/flash_jvp.py: attention forward with its tangent in the same pass, and backward.

Every tensor lies in memory tokens first, (B, L, N, D), as the model's projections leave it.  A program owns
one head and one block of rows (or keys) and walks over the blocks of the other side.  They run on every GPU
with tensor cores; on Hopper, kernels/flash_jvp_hopper.py takes the case that matters there.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.tiles import HAS_GLUON, LN2, LOG2E, head_start, load_rows, store_rows, tokens_first

HEAD_WIDTHS = (32, 64, 128)
# what the Hopper kernel takes
HOPPER_WIDTHS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# one compilation for every length, 1 included
LENGTHS = ("L", "S", "N")


class Tile(NamedTuple):
    """Query rows and keys of a block, warps of a program, stages of its load pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


# bytes of shared memory a program may use -> tiles in 16 bits, made for D = 128: Hopper, A100, smaller ones.
# tests/kernels/test_compile.py holds them to the limits.
TILES = {
    227 << 10: {
        "forward": Tile(128, 64, 8, 3),
        "tangent": Tile(128, 64, 8, 2),
        "backward": Tile(64, 64, 4, 2),
    },
    163 << 10: {
        "forward": Tile(128, 64, 8, 3),
        "tangent": Tile(64, 64, 8, 2),
        "backward": Tile(64, 64, 4, 2),
    },
    99 << 10: {"forward": Tile(64, 64, 4, 2), "tangent": Tile(64, 32, 8, 2), "backward": Tile(64, 32, 4, 2)},
}
# exact fp32 products are no work for tensor cores; small tiles, for tests and not for speed
FP32_TILE = Tile(16, 16, 8, 1)


def tile_for(kind: str, dtype: torch.dtype, shared_bytes: int) -> Tile:
    """The tile of the forward, tangent or backward kernels on a device with that much shared memory."""
    if dtype == torch.float32:
        return FP32_TILE
    return TILES[max((limit for limit in TILES if limit <= shared_bytes), default=min(TILES))][kind]


def options(tile: Tile, head_dim: int, dtype: torch.dtype) -> dict[str, int | str]:
    """The compile-time arguments and launch options of every kernel here."""
    return {
        "D": head_dim,
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "DOT": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, o_ptr, do_ptr, lse_ptr, scale, L, S, N,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """o, the log-sum-exp and, where do_ptr is given, the tangent do.  Absent tangents are None."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    stride = N * D
    q_off = head_start(head, L, N, D)
    k_off = head_start(head, S, N, D)
    q = load_rows(q_ptr + q_off, first, L, stride, D, ROWS)
    if dq_ptr is not None:
        dq = load_rows(dq_ptr + q_off, first, L, stride, D, ROWS)
    m = tl.full([ROWS], -float("inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    r = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, D], tl.float32)
    do = tl.zeros([ROWS, D], tl.float32)
    for key in range(0, S, KEYS):
        k = load_rows(k_ptr + k_off, key, S, stride, D, KEYS)
        s = tl.dot(q, k.T, input_precision=DOT)  # [ROWS, KEYS]
        s = tl.where((key + tl.arange(0, KEYS) < S)[None, :], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * (scale * LOG2E))
        p = tl.exp2(s * (scale * LOG2E) - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        m = m_new
        l = l * shrink + tl.sum(p, 1)
        v = load_rows(v_ptr + k_off, key, S, stride, D, KEYS)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=DOT)
        # p dv and (p ds) v are only ever added: one accumulator for both leaves room for blocks of 128 rows
        if do_ptr is not None:
            do = do * shrink[:, None]
        if dv_ptr is not None:
            dv = load_rows(dv_ptr + k_off, key, S, stride, D, KEYS)
            do = tl.dot(p.to(v.dtype), dv, do, input_precision=DOT)
        if dq_ptr is not None or dk_ptr is not None:
            # absent keys were loaded as zeros: ds is 0 where p is, never infinite
            ds = tl.zeros([ROWS, KEYS], tl.float32)
            if dq_ptr is not None:
                ds = tl.dot(dq, k.T, ds, input_precision=DOT)
            if dk_ptr is not None:
                dk = load_rows(dk_ptr + k_off, key, S, stride, D, KEYS)
                ds = tl.dot(q, dk.T, ds, input_precision=DOT)
            h = p * (ds * scale)
            r = r * shrink + tl.sum(h, 1)
            do = tl.dot(h.to(v.dtype), v, do, input_precision=DOT)
    o = o / l[:, None]
    store_rows(o_ptr + q_off, o, first, L, stride, D, ROWS)
    row = first + tl.arange(0, ROWS)
    tl.store(lse_ptr + head * L + row, (m + tl.log2(l)) * LN2, mask=row < L)
    if do_ptr is not None:
        store_rows(do_ptr + q_off, do / l[:, None] - (r / l)[:, None] * o, first, L, stride, D, ROWS)


@triton.jit(do_not_specialize=LENGTHS)
def key_grad_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, delta_ptr, gk_ptr, gv_ptr, scale, L, S, N,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values, from g, the gradient of o; delta = rowsum(g * o)."""
    first = tl.program_id(0) * KEYS
    head = tl.program_id(1).to(tl.int64)
    stride = N * D
    q_off = head_start(head, L, N, D)
    k_off = head_start(head, S, N, D)
    k = load_rows(k_ptr + k_off, first, S, stride, D, KEYS)
    v = load_rows(v_ptr + k_off, first, S, stride, D, KEYS)
    gk = tl.zeros([KEYS, D], tl.float32)
    gv = tl.zeros([KEYS, D], tl.float32)
    for start in range(0, L, ROWS):
        # rows below the end are zero in q, g, lse and delta, and so add nothing; keys past it are not stored
        q = load_rows(q_ptr + q_off, start, L, stride, D, ROWS)
        g = load_rows(g_ptr + q_off, start, L, stride, D, ROWS)
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


@triton.jit(do_not_specialize=LENGTHS)
def query_grad_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, delta_ptr, gq_ptr, scale, L, S, N,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of queries."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    stride = N * D
    q_off = head_start(head, L, N, D)
    k_off = head_start(head, S, N, D)
    q = load_rows(q_ptr + q_off, first, L, stride, D, ROWS)
    g = load_rows(g_ptr + q_off, first, L, stride, D, ROWS)
    row = first + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + head * L + row, mask=row < L, other=0.0)
    delta = tl.load(delta_ptr + head * L + row, mask=row < L, other=0.0)
    gq = tl.zeros([ROWS, D], tl.float32)
    for key in range(0, S, KEYS):
        k = load_rows(k_ptr + k_off, key, S, stride, D, KEYS)
        v = load_rows(v_ptr + k_off, key, S, stride, D, KEYS)
        s = tl.dot(q, k.T, input_precision=DOT)  # [ROWS, KEYS]
        # without the mask exp2(-lse) of an absent key may be infinite, and infinity times its zero is NaN
        s = tl.where((key + tl.arange(0, KEYS) < S)[None, :], s, -float("inf"))
        p = tl.exp2(s * (scale * LOG2E) - lse[:, None] * LOG2E)
        ds = p * (tl.dot(g, v.T, input_precision=DOT) - delta[:, None])
        gq = tl.dot(ds.to(k.dtype), k, gq, input_precision=DOT)
    store_rows(gq_ptr + q_off, gq * scale, first, L, stride, D, ROWS)


def attention(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The twin of kernels.reference.attention, in q's dtype; lse in fp32."""
    _check(q, k, v)
    tensors = [None if x is None else tokens_first(x) for x in (q, k, v, dq, dk, dv)]
    o, lse, do = run(tensors, form(tensors))
    return o.transpose(1, 2), lse, None if do is None else do.transpose(1, 2)


def form(tensors: list[Tensor | None]) -> Tile | None:
    """How packed q, k, v, dq, dk, dv (B, L or S, N, D) are run: by the kernel here, or Hopper's own: None."""
    q, device = tensors[0], tensors[0].device
    if (
        q.is_cuda
        and torch.cuda.get_device_capability(device)[0] == 9
        and q.dtype != torch.float32
        and q.shape[-1] in HOPPER_WIDTHS
        # its loads start at multiples of 16 bytes
        and all(x is not None and x.data_ptr() % 16 == 0 for x in tensors)
        and HAS_GLUON
    ):
        return None
    has_tangent = any(x is not None for x in tensors[3:])
    return tile_for("tangent" if has_tangent else "forward", q.dtype, _shared_bytes(device))


def run(tensors: list[Tensor | None], tile: Tile | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """o (B, L, N, D), lse (B, N, L) and do like o, of packed q, k, v, dq, dk, dv in the given form."""
    q, k = tensors[:2]
    (B, L, N, D), S = q.shape, k.shape[1]
    o = torch.empty_like(q)
    do = None if all(x is None for x in tensors[3:]) else torch.empty_like(q)
    lse = torch.empty(B, N, L, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        if tile is None:
            from kernels import flash_jvp_hopper

            flash_jvp_hopper.launch(tensors, o, do, lse)
        else:
            sizes = (1 / math.sqrt(D), L, S, N)
            grid = (triton.cdiv(L, tile.rows), B * N)
            forward_kernel[grid](*tensors, o, do, lse, *sizes, **options(tile, D, q.dtype))
    return o, lse, do


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of kernels.reference.attention_backward, in q's dtype."""
    (B, N, L, D), S = q.shape, k.shape[2]
    delta = (grad.float() * o.float()).sum(-1).contiguous()
    q, k, v, g = (tokens_first(x) for x in (q, k, v, grad))
    gq, gk, gv = (torch.empty_like(x) for x in (q, k, v))
    tile = tile_for("backward", q.dtype, _shared_bytes(q.device))
    launch = options(tile, D, q.dtype)
    common, sizes = (q, k, v, g, lse, delta), (1 / math.sqrt(D), L, S, N)
    with torch.cuda.device_of(q):
        key_grad_kernel[triton.cdiv(S, tile.keys), B * N](*common, gk, gv, *sizes, **launch)
        query_grad_kernel[triton.cdiv(L, tile.rows), B * N](*common, gq, *sizes, **launch)
    return gq.transpose(1, 2), gk.transpose(1, 2), gv.transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.shape[-1] not in HEAD_WIDTHS or q.dtype not in DTYPES:
        raise ValueError(
            f"got head width {q.shape[-1]} in {q.dtype}; attention with a tangent on a GPU takes head widths "
            f"{HEAD_WIDTHS} in bf16, fp16 or fp32"
        )
    reference.check_shapes(q, k, v)
    reference.check_dtypes(q, k, v)


def _shared_bytes(device: torch.device) -> int:
    """Shared memory of one program; the interpreter, on a CPU, takes the smallest tiles."""
    if device.type != "cuda":
        return min(TILES)
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
