"""The kernels of 8-bit linear layers compile for every supported GPU, with no GPU, and fit it."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from kernels import int8_linear_triton as int8
from tests.kernels.compiling import SHARED_BYTES, compile_kernel

TYPES = {"x_ptr": "*i8", "w_ptr": "*i8", "x_step_ptr": "*fp32", "w_step_ptr": "*fp32"}
TYPES |= {"bias_ptr": "*bf16", "y_ptr": "*bf16"}
# Hopper's own matrix instructions, and the tensor cores of the others
PRODUCTS = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 120: "mma.sync"}


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_forms_fit_their_gpu(capability: int, gelu: bool) -> None:
    for form in int8.forms_for(capability, True):
        options = int8.product_options(form, gelu)
        kernel = compile_kernel(int8.product_kernel, TYPES, options, capability, ("N", "K"))
        assert kernel.metadata.shared <= SHARED_BYTES[capability]
        assert "s32.s8.s8" in kernel.asm["ptx"]
        assert PRODUCTS[capability] in kernel.asm["ptx"]
        assert kernel.asm["cubin"]
        # copies to shared memory that nobody waits for
        assert ("cp.async.bulk.tensor" if form.tma else "cp.async.cg") in kernel.asm["ptx"]


def test_specialised_form_has_warps_that_load() -> None:
    options = int8.product_options(int8.SPECIALISED, False)
    kernel = compile_kernel(int8.product_kernel, TYPES, options, 90, ("N", "K"))
    assert kernel.metadata.shared <= SHARED_BYTES[90]
    assert kernel.metadata.num_warps > int8.SPECIALISED.warps
    assert "setmaxnreg" in kernel.asm["ptx"]


@pytest.mark.parametrize("width", [1536, 5120, 13824])
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_quantisation_reads_vectors(capability: int, width: int) -> None:
    types = {"x_ptr": "*bf16", "y_ptr": "*i8", "step_ptr": "*fp32"}
    options = int8.quantise_options(width)
    kernel = compile_kernel(int8.quantise_kernel, types, options, capability, ("K",))
    assert "ld.global.v4" in kernel.asm["ptx"]
    assert "fma" not in kernel.asm["ptx"]
