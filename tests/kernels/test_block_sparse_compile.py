"""The kernels of block-sparse attention compile for every supported GPU, with no GPU, and fit it."""

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton.compiler import CompiledKernel

from kernels import block_sparse_int8_triton as int8
from kernels import block_sparse_triton as sparse
from kernels.tiles import HAS_GLUON
from tests.kernels.compiling import SHARED_BYTES, compile_kernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = {
    "forward": sparse.forward_kernel,
    "tangent": sparse.tangent_kernel,
    "queries": sparse.query_grad_kernel,
    "keys": sparse.key_grad_kernel,
}
TYPES = dict.fromkeys(("lse_ptr", "delta_ptr"), "*fp32") | dict.fromkeys(("list_ptr", "starts_ptr"), "*i32")
TYPES["scale"] = "fp32"
INT8_TYPES = TYPES | {"q_ptr": "*i8", "k_ptr": "*i8", "o_ptr": "*bf16"}
INT8_TYPES |= dict.fromkeys(("q_step_ptr", "k_step_ptr"), "*fp32")
QUANTISATION = {
    "statistics": (int8.statistics_kernel, {"CHUNK": int8.CHUNK, "ROWS": 32}),
    "statistics of keys": (int8.statistics_kernel, {"CHUNK": int8.CHUNK, "ROWS": 32, "v_ptr": None}),
    "fold": (int8.fold_kernel, {"ROWS": 64, "LARGEST": 448, "num_warps": 8}),
    "queries": (int8.quantise_kernel, {"ROWS": 128, "mean_ptr": None, "num_warps": 8}),
    "keys": (int8.quantise_kernel, {"ROWS": 64, "num_warps": 4}),
    "values": (int8.quantise_values_kernel, {"KEYS": 64, "PAIRED": True, "num_warps": 4}),
}
# all choices of forms, at the width they are made for
BLOCKS = [(64, 64), (128, 128)]
# Hopper's own matrix instructions, and the tensor cores of the others
PRODUCTS = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 120: "mma.sync"}


def compile_sparse(
    kind: str, form: sparse.Form, capability: int, blocks: tuple[int, int], dtype: torch.dtype = BF16
) -> CompiledKernel:
    kernel = KERNELS[kind]
    element = {BF16: "*bf16", FP32: "*fp32"}[dtype]
    types = {x: element for x in kernel.arg_names if x.endswith("_ptr")} | TYPES
    return compile_kernel(kernel, types, sparse.options(form, 128, dtype, *blocks), capability)


def portable_forms(kind: str, capability: int, block_q: int, block_k: int) -> list[sparse.Form]:
    forms = sparse.forms_for(kind, BF16, capability, block_q, block_k)
    return [form for form in forms if isinstance(form, sparse.Form)]


def descriptors(shapes: list[tuple[list[int], object]], elements: list[str]) -> dict[str, str]:
    """Triton's names of the types of a Hopper kernel's descriptors."""
    pairs = zip(shapes, elements, strict=True)
    types = [
        f"tensordesc<{element}{shape},{layout!r}>".replace(" ", "") for (shape, layout), element in pairs
    ]
    return dict(zip(("q_desc", "k_desc", "v_desc", "o_desc"), types, strict=True))


def compile_gluon(
    form: NamedTuple, block_q: int, block_k: int, width: int, dtype: torch.dtype
) -> CompiledKernel:
    from kernels import block_sparse_hopper as hopper

    element = {BF16: "bf16", FP16: "fp16"}[dtype]
    types = TYPES | descriptors(hopper.shapes(width, block_k, dtype), [element] * 4)
    return compile_kernel(hopper.forward_kernel, types, hopper.options(form, block_q), 90)


def compile_int8(eight: int8.Eight, capability: int, blocks: tuple[int, int]) -> CompiledKernel:
    options = sparse.options(eight.form, 128, BF16, *blocks) | ({} if eight.fp8 else {"v_step_ptr": None})
    del options["DOT"]
    types = INT8_TYPES | ({"v_ptr": "*fp8e4nv", "v_step_ptr": "*fp32"} if eight.fp8 else {"v_ptr": "*bf16"})
    return compile_kernel(int8.attention_kernel, types, options, capability)


def fits(kernel: CompiledKernel, form: sparse.Form, capability: int) -> bool:
    in_place = kernel.metadata.shared <= SHARED_BYTES[capability] and kernel.metadata.num_warps == form.warps
    return in_place and PRODUCTS[capability] in kernel.asm["ptx"] and bool(kernel.asm["cubin"])


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("kind", KERNELS)
def test_forms_fit_their_gpu(kind: str, capability: int, blocks: tuple[int, int]) -> None:
    for form in portable_forms(kind, capability, *blocks):
        assert fits(compile_sparse(kind, form, capability, blocks), form, capability)


def test_four_programs_share_a_hopper_multiprocessor() -> None:
    form = portable_forms("forward", 90, 64, 64)[0]
    kernel = compile_sparse("forward", form, 90, (64, 64))
    # 65,536 registers; with more than 128 a thread, or more shared memory, fewer programs would fit
    assert kernel.metadata.maxnreg * 32 * form.warps * 4 <= 65536
    assert (kernel.metadata.shared + 1024) * 4 <= 228 << 10
    assert "cp.async.bulk.tensor" in kernel.asm["ptx"]


@pytest.mark.skipif(not HAS_GLUON, reason="this Triton is older than the Hopper kernel's language")
@pytest.mark.parametrize(
    ("block_q", "block_k", "width", "dtype"),
    [(128, 64, 128, BF16), (128, 128, 64, FP16), (128, 32, 32, BF16), (64, 64, 128, BF16)],
)
def test_hopper_kernel_keeps_products_in_flight(
    block_q: int, block_k: int, width: int, dtype: torch.dtype
) -> None:
    from kernels.block_sparse_hopper import FORMS

    groups, form = block_q // 64, FORMS[block_q]
    kernel = compile_gluon(form, block_q, block_k, width, dtype)
    assert_shares_a_hopper(kernel, form, groups)
    sass = kernel.asm["sass"]
    # nothing is spilt to local memory
    assert "STL" not in sass
    # ptxas waits after every product where it cannot follow the waits that were asked for
    waits = kernel.asm["ptx"].count("wgmma.wait_group")
    assert sass.count("WARPGROUP.DEPBAR") == waits == 4 * groups
    assert exponentials(sass, pending=1) == [form.keys // 2 + 2] * groups


@pytest.mark.skipif(not HAS_GLUON, reason="this Triton is older than the Hopper kernel's language")
@pytest.mark.parametrize(("width", "dtype"), [(128, BF16), (64, FP16), (32, BF16)])
def test_eight_bit_hopper_kernel_keeps_products_in_flight(width: int, dtype: torch.dtype) -> None:
    from kernels import block_sparse_int8_hopper as hopper

    types = TYPES | dict.fromkeys(("q_step_ptr", "k_step_ptr", "v_step_ptr"), "*fp32")
    elements = ["i8", "i8", "fp8e4nv", {BF16: "bf16", FP16: "fp16"}[dtype]]
    types |= descriptors(hopper.shapes(width, 64, dtype), elements)
    form = hopper.FORMS[128, 64]
    kernel = compile_kernel(hopper.attention_kernel, types, hopper.options(form), 90)
    assert_shares_a_hopper(kernel, form, groups=2)
    sass = kernel.asm["sass"]
    # one more, after the first of two products of a tile, whose sums must start from other registers
    assert sass.count("WARPGROUP.DEPBAR") <= kernel.asm["ptx"].count("wgmma.wait_group") + 1
    assert exponentials(sass, pending=2) == [form.keys // 2 + 2] * 2


def assert_shares_a_hopper(kernel: CompiledKernel, form: NamedTuple, groups: int) -> None:
    """As many programs as the form wants fit a multiprocessor's 228 KiB and 65,536 registers."""
    # 1 KiB of a program's is not its own; groups of four warps, and as many for the loader
    assert (kernel.metadata.shared + 1024) * form.programs <= 228 << 10
    assert kernel.metadata.num_warps == 4 * (groups + 1)
    assert kernel.metadata.maxnreg * 32 * kernel.metadata.num_warps * form.programs <= 65536


def exponentials(sass: str, pending: int) -> list[int]:
    """How many of a thread's lie between each wait that leaves products pending and the next.

    Four threads share two rows of the scores: half as many as a step has keys, and one a row to shrink sums.
    ptxas may wait too early, and leave none.
    """
    loops = sass.split(f"WARPGROUP.DEPBAR.LE gsb0, 0x{pending}")[1:]
    return [loop.split("WARPGROUP.DEPBAR")[0].count("MUFU.EX2") for loop in loops]


@pytest.mark.parametrize("kind", KERNELS)
def test_fp32_mode_multiplies_in_fp32(kind: str) -> None:
    kernel = compile_sparse(kind, sparse.FP32, 90, (64, 64), FP32)
    assert kernel.metadata.shared <= SHARED_BYTES[90]
    assert "mma" not in kernel.asm["ptx"]


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_eight_bit_forms_fit_their_gpu(capability: int, blocks: tuple[int, int]) -> None:
    for eight in int8.forms_for(capability, *blocks):
        if not isinstance(eight.form, sparse.Form):
            continue
        kernel = compile_int8(eight, capability, blocks)
        assert fits(kernel, eight.form, capability)
        assert "s32.s8.s8" in kernel.asm["ptx"]
        assert ("e4m3.e4m3" in kernel.asm["ptx"]) == eight.fp8


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("name", QUANTISATION)
def test_quantisation_moves_long_words(name: str, capability: int) -> None:
    if name == "values" and capability < 89:
        pytest.skip("this GPU knows no e4m3")
    kernel, options = QUANTISATION[name]
    types = dict.fromkeys((x for x in kernel.arg_names if x.endswith("_ptr")), "*fp32") | {"tiny": "fp32"}
    types |= dict.fromkeys(("k_ptr", "v_ptr", "x_ptr"), "*bf16")
    types["y_ptr"] = "*i32" if name == "values" else "*i8"
    compiled = compile_kernel(kernel, types, {"D": 128, **options}, capability)
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    ptx = compiled.asm["ptx"]
    # 16 bytes at a time; what a loop loads, ahead of its turn
    assert ("cp.async.cg" if "statistics" in name else "ld.global.v4") in ptx
    if "y_ptr" in kernel.arg_names:
        assert "st.global.v4" in ptx
        # no conversion of floats to integers, which are slow
        assert "s32.f32" not in ptx
