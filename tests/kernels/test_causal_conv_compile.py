"""The kernel of causal convolutions compiles for Hopper, with no GPU, within its limits."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from kernels import causal_conv_triton as kernels
from tests.kernels.compiling import SHARED_BYTES, compile_kernel

# channels in and out: of Wan2.1, where all are whole steps, and some of Wan2.2
CHANNELS = [(96, 96), (192, 192), (192, 384), (384, 384), (160, 160), (1024, 512)]


def descriptors(options: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The tiles of the kernel's descriptors; with a side of 0 there is none."""
    k, n = ([options[f"{name}{i}"] for i in range(2)] for name in "KN")
    tile = options["ROWS"], options["COLUMNS"]
    x = {f"x{i}": (1, *tile, depth) for i, depth in enumerate(k)}
    w = {f"w{j}{i}": (width, depth) for j, width in enumerate(n) for i, depth in enumerate(k)}
    return x | w | {f"y{j}": (1, *tile, width) for j, width in enumerate(n)}


@pytest.mark.parametrize(("C", "N"), CHANNELS)
def test_kernel_compiles_for_hopper(C: int, N: int) -> None:
    options = kernels.options(C, N)
    blocks = descriptors(options)
    types = {name: f"tensordesc<bf16{list(block)}>" for name, block in blocks.items() if all(block)}
    absent = dict.fromkeys(blocks.keys() - types.keys())
    kernel = compile_kernel(kernels.conv_kernel, types, options | absent, 90)
    assert kernel.metadata.shared <= SHARED_BYTES[90]
    sass = kernel.asm["sass"]
    # copies by TMA, products of what lies in shared memory, and registers for all of it
    assert "UTMALDG" in sass
    assert "HGMMA" in sass
    assert "STL" not in sass


@pytest.mark.parametrize(("C", "N"), CHANNELS)
def test_channels_are_handled_whole(C: int, N: int) -> None:
    options = kernels.options(C, N)
    assert C % (options["K0"] + options["K1"]) == 0
    assert N % (options["N0"] + options["N1"]) == 0


def test_wans_channels_share_what_is_read() -> None:
    assert {n: sum(kernels.parts(n, kernels.WIDEST)) for n in (96, 192, 384)} == {96: 96, 192: 192, 384: 192}
