"""Every kernel compiles for every supported GPU, with no GPU, and fits its shared memory."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402 (after the skip)
from triton.compiler import CompiledKernel  # noqa: E402

from kernels import flash_jvp_triton as flash  # noqa: E402
from kernels.tiles import HAS_GLUON  # noqa: E402
from tests.kernels.compiling import SHARED_BYTES, compile_kernel  # noqa: E402

ABSENT = {
    "forward": ("dq_ptr", "dk_ptr", "dv_ptr", "do_ptr"),
    "tangent": (),
    "cross_tangent": ("dk_ptr", "dv_ptr"),
}
KERNELS = {name: (flash.forward_kernel, absent) for name, absent in ABSENT.items()} | {
    "backward_keys": (flash.key_grad_kernel, ()),
    "backward_queries": (flash.query_grad_kernel, ()),
}
FP32_POINTERS = ("lse_ptr", "delta_ptr")


def compile_flash(name: str, capability: int, dtype: torch.dtype, head_dim: int) -> CompiledKernel:
    kernel, absent = KERNELS[name]
    kind = {"cross_tangent": "tangent"}.get(name, name.split("_")[0])
    tile = flash.tile_for(kind, dtype, SHARED_BYTES[capability])
    element = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types = {x: element for x in kernel.arg_names if x.endswith("_ptr")} | {"scale": "fp32"}
    types |= dict.fromkeys(FP32_POINTERS, "*fp32")
    return compile_kernel(
        kernel, types, flash.options(tile, head_dim, dtype) | dict.fromkeys(absent), capability
    )


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_fits_the_gpu(name: str, capability: int) -> None:
    kernel = compile_flash(name, capability, torch.bfloat16, 128)
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= SHARED_BYTES[capability]
    # Hopper's own matrix instructions, and the tensor cores of the others
    assert ("wgmma" if capability == 90 else "mma.sync") in kernel.asm["ptx"]


@pytest.mark.parametrize("name", ["tangent", "backward_keys"])
def test_fp32_mode_multiplies_in_fp32(name: str) -> None:
    kernel = compile_flash(name, 90, torch.float32, 64)
    assert kernel.metadata.shared <= SHARED_BYTES[90]
    assert "mma" not in kernel.asm["ptx"]


def compile_for_hopper(dtype: torch.dtype, head_dim: int) -> CompiledKernel:
    from triton.experimental.gluon._runtime import GluonASTSource

    from kernels import flash_jvp_hopper as hopper

    kernel = hopper.tangent_kernel
    element = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    tile = f"tensordesc<{element}[1,{hopper.TILE},{head_dim}],{hopper.tile_layout(head_dim, dtype)!r}>"
    signature = dict.fromkeys(kernel.arg_names, "i32") | {"scale": "fp32", "STAGES": "constexpr"}
    signature |= {x: tile for x in kernel.arg_names if x.endswith("_desc")}
    signature |= {x: f"*{element}" for x in kernel.arg_names if x.endswith("_ptr")} | {"lse_ptr": "*fp32"}
    place = kernel.arg_names.index
    aligned = {(place(x),): [["tt.divisibility", 16]] for x in ("o_ptr", "do_ptr", "lse_ptr")}
    source = GluonASTSource(kernel, signature, {(place("STAGES"),): hopper.STAGES}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=hopper.LAUNCH)


@pytest.mark.skipif(not HAS_GLUON, reason="this Triton is older than the Hopper kernel's language")
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 128), (torch.float16, 64)])
def test_hopper_kernel_fits_and_keeps_products_in_flight(dtype: torch.dtype, head_dim: int) -> None:
    kernel = compile_for_hopper(dtype, head_dim)
    assert kernel.metadata.shared <= SHARED_BYTES[90]
    # two warp groups, and the loader's
    assert kernel.metadata.num_warps == 12
    # ptxas waits after every product where it cannot follow the waits that were asked for
    waits = kernel.asm["ptx"].count("wgmma.wait_group")
    assert kernel.asm["sass"].count("WARPGROUP.DEPBAR") == waits == 6
