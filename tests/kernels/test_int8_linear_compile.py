"""The kernels of 8-bit linear layers compile for every supported GPU, with no GPU, and fit it."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton.compiler import CompiledKernel

from kernels import int8_linear_triton as int8
from kernels import rows_triton
from kernels.int8_linear_triton import Finish
from kernels.tiles import HAS_GLUON
from tests.kernels.compiling import SHARED_BYTES, compile_kernel

TYPES = {"x_ptr": "*i8", "w_ptr": "*i8", "x_step_ptr": "*fp32", "w_step_ptr": "*fp32", "bias_ptr": "*bf16"}
TYPES |= {"add_ptr": "*bf16", "gate_ptr": "*fp32", "y_ptr": "*bf16"}
# Hopper's own matrix instructions, and the tensor cores of the others
PRODUCTS = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 120: "mma.sync"}
FINISHES = {
    "nothing": Finish(),
    "GELU": Finish(gelu=True),
    "sum": Finish(add=True),
    "one gate": Finish(add=True, gates="one"),
    "gates": Finish(add=True, gates="many"),
    "three parts": Finish(parts=3),
}


def compile_product(form: int8.Form, finish: Finish, capability: int) -> CompiledKernel:
    options = int8.product_options(form, finish) | absent(finish)
    return compile_kernel(int8.product_kernel, TYPES, options, capability, ("N", "K"))


def absent(finish: Finish) -> dict[str, None]:
    return ({} if finish.add else {"add_ptr": None}) | ({"gate_ptr": None} if finish.gates == "no" else {})


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_forms_fit_their_gpu(capability: int, finish: str) -> None:
    for form in int8.forms_for(capability, True):
        if not isinstance(form, int8.Form):
            continue
        kernel = compile_product(form, FINISHES[finish], capability)
        assert kernel.metadata.shared <= SHARED_BYTES[capability]
        assert "s32.s8.s8" in kernel.asm["ptx"]
        assert PRODUCTS[capability] in kernel.asm["ptx"]
        assert kernel.asm["cubin"]
        # copies to shared memory that nobody waits for
        assert ("cp.async.bulk.tensor" if form.tma else "cp.async.cg") in kernel.asm["ptx"]
        # in registers, but for a few numbers of a gated sum
        assert "STL" not in kernel.asm["sass"] or FINISHES[finish].add


@pytest.mark.skipif(not HAS_GLUON, reason="this Triton is older than the Hopper kernel's language")
@pytest.mark.parametrize(("rows", "columns"), [(256, 128), (128, 256)])
@pytest.mark.parametrize("finish", FINISHES)
def test_hopper_kernel_keeps_products_in_flight(finish: str, rows: int, columns: int) -> None:
    from kernels import int8_linear_hopper as hopper

    form, elements = hopper.Form(rows, columns), ("i8", "i8", "bf16")
    types = {name: kind for name, kind in TYPES.items() if name not in ("x_ptr", "w_ptr", "y_ptr")}
    for name, element, (shape, layout) in zip(
        ("x_desc", "w_desc", "y_desc"), elements, hopper.shapes(form, torch.bfloat16), strict=True
    ):
        types[name] = f"tensordesc<{element}{shape},{layout!r}>".replace(" ", "")
    options = hopper.options(form, FINISHES[finish]) | absent(FINISHES[finish])
    kernel = compile_kernel(hopper.product_kernel, types, options, 90, ("N", "K"))
    assert kernel.metadata.shared <= SHARED_BYTES[90]
    # two groups of four warps that multiply, and as many for the loader
    assert kernel.metadata.num_warps == 12
    assert kernel.metadata.maxnreg * 32 * 12 <= 65536
    sass = kernel.asm["sass"]
    # in registers, but for a few numbers beside gates of more than one row
    assert sass.count("STL") <= (8 if finish == "gates" else 0)
    # ptxas waits after every product where it cannot follow the waits that were asked for: two in each group
    waits = kernel.asm["ptx"].count("wgmma.wait_group")
    assert sass.count("WARPGROUP.DEPBAR") == waits == 4
    assert "s32.s8.s8" in kernel.asm["ptx"]
    assert ("prefetch.global.L2" in kernel.asm["ptx"]) == FINISHES[finish].add


@pytest.mark.parametrize("width", [1536, 5120, 8960, 13824])
@pytest.mark.parametrize("numbers", ["*i8", "*fp8e4nv"])
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_quantisation_reads_vectors(capability: int, numbers: str, width: int) -> None:
    if numbers == "*fp8e4nv" and capability < 89:
        pytest.skip("no e4m3 on this GPU")
    types = {"x_ptr": "*bf16", "y_ptr": numbers, "step_ptr": "*fp32"}
    options = rows_triton.quantise_options(width)
    kernel = compile_kernel(rows_triton.quantise_kernel, types, options, capability)
    assert "ld.global.v4" in kernel.asm["ptx"]
    assert "fma" not in kernel.asm["ptx"]
    # to the nearest even, and no further than 448
    assert ("cvt.rn.satfinite.e4m3x2.f" in kernel.asm["ptx"]) == (numbers == "*fp8e4nv")
