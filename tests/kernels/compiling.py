"""Compiling kernels for GPUs that need not be there."""

from collections.abc import Collection, Mapping

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import JITFunction

# CUDA's programming guide, "technical specifications per compute capability": most bytes a block may use
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}


def compile_kernel(
    kernel: JITFunction,
    types: Mapping[str, str],
    options: Mapping[str, object],
    capability: int,
    multiples: Collection[str] = (),
) -> CompiledKernel:
    """The kernel as a launch with such arguments compiles it for a GPU of that capability, 90 for 9.0.

    types: arguments to Triton's names of their types, "*bf16" or "fp32"; those of no stated type are "i32".
    A kernel in Gluon takes descriptors too, "tensordesc<...>" with a layout.
    options: the rest of a launch's keywords: compile-time arguments, None for absent pointers, num_warps ...
    multiples: numbers that are multiples of 16, which a launch sees.
    """
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    launch = {name: value for name, value in options.items() if name not in constants}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(
        constants, "constexpr"
    )
    place = kernel.arg_names.index
    # allocations are aligned, and a launch says so: without it the compiler makes another kernel
    aligned = {
        (place(x),): [["tt.divisibility", 16]]
        for x, kind in signature.items()
        if kind.startswith("*") or x in multiples
    }
    language = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        language = GluonASTSource
    source = language(kernel, signature, {(place(x),): value for x, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
