"""Poisoned memory; and bf16 and e4m3 for Triton's interpreter (TRITON_INTERPRET=1), which computes on
bf16's bits as if they were integers, and truncates what it makes e4m3."""

import os
from collections.abc import Callable, Iterator

import pytest

from kernels.selftest import poisoned


@pytest.fixture
def poison() -> Iterator[None]:
    """Outputs start as NaN: an element that a kernel does not write cannot pass."""
    with poisoned():
        yield


def _install() -> None:
    """Compute on bf16 in fp32 and round results, and e4m3, to the nearest even, as a GPU does."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    Handle = interpreter.TensorHandle
    builder = interpreter.InterpreterBuilder

    def is_bf16(x: object) -> bool:
        return isinstance(x, Handle) and x.dtype.scalar == tl.bfloat16

    def widen(x: object) -> object:
        return Handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if is_bf16(x) else x

    def narrow(x: Handle) -> Handle:
        bits = np.ascontiguousarray(x.data, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        rounded = np.where(np.isnan(x.data), np.uint16(0x7FC0), rounded)
        return Handle(rounded.reshape(x.data.shape), tl.bfloat16)

    def in_fp32(method: Callable[..., Handle]) -> Callable[..., Handle]:
        def call(self: object, *args: object) -> Handle:
            out = method(self, *map(widen, args))
            arithmetic = out.dtype.scalar == tl.float32 and out.data.dtype == np.float32
            return narrow(out) if is_bf16(args[0]) and arithmetic else out

        return call

    cast, dot, fp_to_fp = builder.cast_impl, builder.create_dot, builder.create_fp_to_fp

    def create_fp_to_fp(self: object, x: Handle, dtype: tl.dtype, rounding: object) -> Handle:
        if dtype.scalar != tl.float8e4nv or x.dtype.scalar != tl.float32:
            return fp_to_fp(self, x, dtype, rounding)
        rounded = torch.from_numpy(np.ascontiguousarray(x.data)).to(torch.float8_e4m3fn)
        return Handle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)

    def cast_impl(self: object, x: Handle, dtype: tl.dtype) -> Handle:
        if dtype.scalar != tl.bfloat16:
            return cast(self, widen(x), dtype)
        return x if is_bf16(x) else narrow(cast(self, x, tl.float32))

    def create_dot(self: object, a: Handle, b: Handle, *rest: object) -> Handle:
        return dot(self, widen(a), widen(b), *rest)

    for name in ("binary_op", "unary_op", "create_fma"):
        setattr(builder, name, in_fp32(getattr(builder, name)))
    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    builder.create_fp_to_fp = create_fp_to_fp


if os.environ.get("TRITON_INTERPRET") == "1":
    _install()
