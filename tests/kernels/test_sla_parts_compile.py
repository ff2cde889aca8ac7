"""The kernels of the block map compile for every GPU, with none, and fit it."""

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.compiler import CompiledKernel  # noqa: E402 (after the skip)

from kernels import block_map_triton as block_map  # noqa: E402
from tests.kernels.compiling import SHARED_BYTES, compile_kernel  # noqa: E402

MEAN = {"BLOCK_Q": 128, "BLOCK_K": 64, "D": 128, "TOKENS": block_map.TOKENS, "num_warps": block_map.WARPS}
SCORE = {"D": 128, "TILE": block_map.TILE, "CHANNELS": block_map.CHANNELS}
FP32_POINTERS = {"mean_q_ptr", "mean_k_ptr", "score_ptr"}
KERNELS = {
    "means": (block_map.mean_kernel, MEAN),
    "scores": (block_map.score_kernel, SCORE),
    "select 512": (block_map.select_kernel, {"WIDTH": 512, "TILE": block_map.TILE, "num_warps": 1}),
    "select 2048": (block_map.select_kernel, {"WIDTH": 2048, "TILE": block_map.TILE, "num_warps": 1}),
}


def compile_part(name: str, capability: int) -> CompiledKernel:
    kernel, options = KERNELS[name]
    types = {x: "*fp32" if x in FP32_POINTERS else "*bf16" for x in kernel.arg_names if x.endswith("_ptr")}
    return compile_kernel(kernel, types | {"index_ptr": "*i32"}, options, capability)


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_fits_the_gpu(name: str, capability: int) -> None:
    kernel = compile_part(name, capability)
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= SHARED_BYTES[capability]
    if name == "scores":
        assert "mma" in kernel.asm["ptx"]  # on tensor cores
    # loads 16 bytes wide where they are long, without which memory is not used at its speed
    if name == "means":
        assert "v4" in kernel.asm["ptx"]
    if capability == 90:
        assert "STL" not in kernel.asm["sass"]  # all that a thread holds is in registers
