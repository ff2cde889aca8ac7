"""The kernels between convolutions compile for every supported GPU, with no GPU, and stay in registers."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from triton.compiler import CompiledKernel

from kernels import pixels_triton as pixels
from tests.kernels.compiling import SHARED_BYTES, compile_kernel

KERNELS = {"norm": pixels.norm_kernel, "sum": pixels.add_kernel, "enlargement": pixels.enlarge_kernel}


def compile_step(name: str, channels: int, capability: int) -> CompiledKernel:
    kernel = KERNELS[name]
    types = {x: "*bf16" for x in kernel.arg_names if x.endswith("_ptr")}
    return compile_kernel(kernel, types, pixels.options(channels), capability)


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_for_the_gpu(name: str, capability: int) -> None:
    kernel = compile_step(name, 96, capability)
    assert kernel.asm["cubin"]
    # loads and stores 16 bytes wide, without which memory is not used at its speed
    for access in ("ld.global.v4", "st.global.v4"):
        assert access in kernel.asm["ptx"]


@pytest.mark.parametrize("channels", [96, 160, 192, 384, 1024])
@pytest.mark.parametrize("name", KERNELS)
def test_tiles_are_in_registers(name: str, channels: int) -> None:
    assert "STL" not in compile_step(name, channels, 90).asm["sass"]
    # no lane masked off: these widths are whole tiles
    assert channels % pixels.options(channels)["CHUNK"] == 0
