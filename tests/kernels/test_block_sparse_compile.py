"""The kernels of block-sparse attention compile for every supported GPU, with no GPU, and fit it."""

import subprocess
import tempfile
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs
from triton.compiler import CompiledKernel

from kernels import block_sparse_int8_triton as int8
from kernels import block_sparse_triton as sparse
from kernels.reference import FEATURE_MAPS
from kernels.tiles import HAS_GLUON
from tests.kernels.compiling import SHARED_BYTES, compile_kernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ELEMENTS = {BF16: "bf16", FP16: "fp16"}
# what kernels for Hopper take for the linear branch
BRANCH = ("folded_desc", "vectors_ptr", "bias_ptr")
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
    types = [descriptor(*tile, element) for tile, element in zip(shapes, elements, strict=True)]
    return dict(zip(("q_desc", "k_desc", "v_desc", "o_desc"), types, strict=True))


def descriptor(shape: list[int], layout: object, element: str) -> str:
    return f"tensordesc<{element}{shape},{layout!r}>".replace(" ", "")


def compile_gluon(
    block_q: int, block_k: int, width: int, dtype: torch.dtype, feature_map: str | None = None
) -> CompiledKernel:
    from kernels import block_sparse_hopper as hopper

    element = ELEMENTS[dtype]
    types = TYPES | descriptors(hopper.shapes(width, block_k, dtype), [element] * 4)
    types |= branch_types(width, dtype)
    absent = BRANCH if feature_map is None else ("lse_ptr",)
    options = hopper.options(hopper.FORMS[block_q], block_q, feature_map) | dict.fromkeys(absent)
    return compile_kernel(hopper.forward_kernel, types, options, 90)


def compile_eight_bit_gluon(width: int, dtype: torch.dtype, feature_map: str | None = None) -> CompiledKernel:
    from kernels import block_sparse_int8_hopper as hopper

    types = TYPES | dict.fromkeys(("q_step_ptr", "k_step_ptr", "v_step_ptr"), "*fp32")
    types |= descriptors(hopper.shapes(width, 64, dtype), ["i8", "i8", "fp8e4nv", ELEMENTS[dtype]])
    types |= branch_types(width, dtype) | {"exact_desc": types["o_desc"]}
    absent = (*BRANCH, "exact_desc") if feature_map is None else ()
    options = hopper.options(hopper.FORMS[128, 64], feature_map) | dict.fromkeys(absent)
    return compile_kernel(hopper.attention_kernel, types, options, 90)


def branch_types(width: int, dtype: torch.dtype) -> dict[str, str]:
    """Of what a kernel for Hopper takes for the linear branch."""
    from kernels.block_sparse_hopper import square

    return {
        "folded_desc": descriptor(*square(width, dtype), ELEMENTS[dtype]),
        "vectors_ptr": "*fp32",
        "bias_ptr": f"*{ELEMENTS[dtype]}",
    }


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
    kernel = compile_gluon(block_q, block_k, width, dtype)
    assert_shares_a_hopper(kernel, form, groups)
    assert_keeps_products_in_flight(kernel, form, groups, waits=4)


@pytest.mark.skipif(not HAS_GLUON, reason="this Triton is older than the Hopper kernel's language")
@pytest.mark.parametrize(("block_k", "width"), [(64, 128), (128, 64)])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_hopper_kernel_has_room_for_the_linear_branch(feature_map: str, block_k: int, width: int) -> None:
    from kernels.block_sparse_hopper import FORMS

    kernel = compile_gluon(128, block_k, width, BF16, feature_map)
    assert_shares_a_hopper(kernel, FORMS[128], groups=2)
    # one product more
    assert_keeps_products_in_flight(kernel, FORMS[128], groups=2, waits=5)


def assert_keeps_products_in_flight(
    kernel: CompiledKernel, form: NamedTuple, groups: int, waits: int
) -> None:
    sass = machine_code(kernel)
    # nothing is spilt to local memory
    assert "STL" not in sass
    # ptxas waits after every product where it cannot follow the waits that were asked for
    asked = kernel.asm["ptx"].count("wgmma.wait_group")
    assert sass.count("WARPGROUP.DEPBAR") == asked == waits * groups
    assert exponentials(sass, pending=1) == [form.keys // 2 + 2] * groups


@pytest.mark.skipif(not HAS_GLUON, reason="this Triton is older than the Hopper kernel's language")
@pytest.mark.parametrize(("width", "dtype"), [(128, BF16), (64, FP16), (32, BF16)])
def test_eight_bit_hopper_kernel_keeps_products_in_flight(width: int, dtype: torch.dtype) -> None:
    assert_eight_bits_keep_products_in_flight(compile_eight_bit_gluon(width, dtype))


@pytest.mark.skipif(not HAS_GLUON, reason="this Triton is older than the Hopper kernel's language")
@pytest.mark.parametrize(
    ("width", "feature_map"), [(128, "softmax"), (128, "elu"), (128, "relu"), (64, "softmax")]
)
def test_eight_bit_hopper_kernel_has_room_for_the_linear_branch(width: int, feature_map: str) -> None:
    kernel = compile_eight_bit_gluon(width, BF16, feature_map)
    assert_eight_bits_keep_products_in_flight(kernel)
    assert "STL" not in machine_code(kernel)  # nothing is spilt to local memory


def assert_eight_bits_keep_products_in_flight(kernel: CompiledKernel) -> None:
    from kernels.block_sparse_int8_hopper import FORMS

    form = FORMS[128, 64]
    assert_shares_a_hopper(kernel, form, groups=2)
    sass = machine_code(kernel)
    # one more, after the first of two products of a tile, whose sums must start from other registers
    assert sass.count("WARPGROUP.DEPBAR") <= kernel.asm["ptx"].count("wgmma.wait_group") + 1
    assert exponentials(sass, pending=2) == [form.keys // 2 + 2] * 2


def assert_shares_a_hopper(kernel: CompiledKernel, form: NamedTuple, groups: int) -> None:
    """As many programs as the form wants fit a multiprocessor's 228 KiB and 65,536 registers."""
    # 1 KiB of a program's is not its own; groups of four warps, and as many for the loader
    assert (kernel.metadata.shared + 1024) * form.programs <= 228 << 10
    assert kernel.metadata.num_warps == 4 * (groups + 1)
    assert kernel.metadata.maxnreg * 32 * kernel.metadata.num_warps * form.programs <= 65536


def machine_code(kernel: CompiledKernel) -> str:
    """All of it: what Triton itself calls "sass" ends after some thousand lines."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = (knobs.nvidia.cuobjdump.path, "-sass", file.name)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


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
