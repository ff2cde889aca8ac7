"""The kernels of 8-bit linear layers compile for every supported GPU, with no GPU, and fit it."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from triton.compiler import CompiledKernel

from kernels import int8_linear_triton as int8
from kernels.int8_linear_triton import Finish
from tests.kernels.compiling import SHARED_BYTES, compile_kernel

TYPES = {"x_ptr": "*i8", "w_ptr": "*i8", "x_step_ptr": "*fp32", "w_step_ptr": "*fp32", "bias_ptr": "*bf16"}
TYPES |= {"add_ptr": "*bf16", "gate_ptr": "*fp32", "y_ptr": "*bf16"}
# Hopper's own matrix instructions, and the tensor cores of the others
PRODUCTS = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 120: "mma.sync"}
FINISHES = {
    "nothing": Finish(),
    "GELU": Finish(gelu=True),
    "one gate": Finish(gated=True),
    "gates": Finish(gated=True, is_one=False),
    "three parts": Finish(parts=3),
}


def compile_product(form: int8.Form, finish: Finish, capability: int) -> CompiledKernel:
    options = int8.product_options(form, finish)
    if not finish.gated:
        options |= {"add_ptr": None, "gate_ptr": None}
    return compile_kernel(int8.product_kernel, TYPES, options, capability, ("N", "K"))


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_forms_fit_their_gpu(capability: int, finish: str) -> None:
    for form in int8.forms_for(capability, True):
        kernel = compile_product(form, FINISHES[finish], capability)
        assert kernel.metadata.shared <= SHARED_BYTES[capability]
        assert "s32.s8.s8" in kernel.asm["ptx"]
        assert PRODUCTS[capability] in kernel.asm["ptx"]
        assert kernel.asm["cubin"]
        # copies to shared memory that nobody waits for
        assert ("cp.async.bulk.tensor" if form.tma else "cp.async.cg") in kernel.asm["ptx"]
        # in registers, but for gates of more than one row
        assert finish == "gates" or capability != 90 or "STL" not in kernel.asm["sass"]


@pytest.mark.parametrize("finish", FINISHES)
def test_specialised_form_has_warps_that_load(finish: str) -> None:
    kernel = compile_product(int8.SPECIALISED, FINISHES[finish], 90)
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
