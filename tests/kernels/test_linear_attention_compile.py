"""The kernels of the linear branch compile for every GPU, with none, and fit it."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.compiler import CompiledKernel  # noqa: E402 (after the skip)

from kernels import linear_attention_grad_triton as grad  # noqa: E402
from kernels import linear_attention_tangent_triton as tangent  # noqa: E402
from kernels import linear_attention_triton as linear  # noqa: E402
from tests.kernels.compiling import SHARED_BYTES, compile_kernel  # noqa: E402

FOLD = {"D": 128, "ROWS": linear.FOLD_ROWS, "COLUMNS": linear.FOLD_COLUMNS, "PARTS": linear.FOLD_PARTS}
FP32_POINTERS = {f"{name}_ptr" for name in ("parts", "state", "vectors", "g_vectors", "rows")}
MODULES = {"tangent": tangent, "grad": grad}
WALKS = {
    kind: getattr(MODULES.get(kind.rpartition("_")[2], linear), f"{kind}_kernel") for kind in linear.PORTABLE
}
# name: kernel, compile-time arguments beside those of its tile
KERNELS = {
    "fold": (linear.fold_kernel, FOLD | {"FORWARD": True}),
    "fold gradients": (linear.fold_kernel, FOLD | {"FORWARD": False}),
    **{kind: (kernel, {}) for kind, kernel in WALKS.items()},
    "output alone": (WALKS["output"], {"add_ptr": None}),
    "query_grad alone": (WALKS["query_grad"], {"more_ptr": None}),
    "key_grad alone": (WALKS["key_grad"], {"more_k_ptr": None, "more_v_ptr": None}),
    "output_tangent alone": (WALKS["output_tangent"], {"add_ptr": None, "d_add_ptr": None}),
}


def compile_part(name: str, capability: int) -> CompiledKernel:
    kernel, options = KERNELS[name]
    if kernel is not linear.fold_kernel:
        tile = linear.tile_for(name.split()[0], torch.bfloat16, capability)
        options = options | linear.options(tile, 128, torch.bfloat16, "softmax")
    types = {x: "*fp32" if x in FP32_POINTERS else "*bf16" for x in kernel.arg_names if x.endswith("_ptr")}
    return compile_kernel(kernel, types, options, capability)


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_fits_the_gpu(name: str, capability: int) -> None:
    kernel = compile_part(name, capability)
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= SHARED_BYTES[capability]
    if KERNELS[name][0] is not linear.fold_kernel:
        assert "mma" in kernel.asm["ptx"]  # on tensor cores
        # loads 16 bytes wide, without which memory is not used at its speed
        assert "v4" in kernel.asm["ptx"]
    if capability == 90:
        # all that a thread holds is in registers, but for a few words where the most of them, 255, do not do
        spilled = kernel.asm["sass"].count("STL")
        assert spilled <= 16 * name.startswith(("output_tangent", "query_grad", "key_grad"))


@pytest.mark.parametrize("kind", WALKS)
def test_fp32_multiplies_in_fp32(kind: str) -> None:
    kernel = WALKS[kind]
    types = {x: "*fp32" for x in kernel.arg_names if x.endswith("_ptr")}
    options = linear.options(linear.FP32_TILE, 64, torch.float32, "elu")
    compiled = compile_kernel(kernel, types, options, 90)
    assert compiled.metadata.shared <= SHARED_BYTES[90]
    assert "mma" not in compiled.asm["ptx"]
