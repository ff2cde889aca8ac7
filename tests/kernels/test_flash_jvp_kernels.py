"""The Triton kernels of attention with a tangent: on a GPU, or in the interpreter by test_without_gpu.py."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from kernels import flash_jvp_triton, reference
from kernels.flash_jvp import attention
from tests.kernels.judging import DEVICE, GPU, ROUNDINGS, allowed, differentiate, error, widen

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

BF16, FP32 = torch.bfloat16, torch.float32
# rows, keys, head width.  One row or key, less than a block of any tile, one off a multiple of it
SMALL = [(1, 1, 32), (17, 63, 32), (63, 1, 32), (1, 65, 32)]
LARGE = [(1, 64, 64), (63, 63, 128), (129, 65, 64), (999, 999, 128), (1024, 1024, 64), (1000, 515, 128)]
SHAPES = [*SMALL, *LARGE, (200, 32760, 128)] if GPU else SMALL
# every shape with every tangent, one shape with each choice of tangents; "q" is cross-attention's
CASES = [(BF16, shape, "qkv") for shape in SHAPES]
CASES += [(BF16, SMALL[1], given) for given in ("q", "k", "v", "kv", "")]
CASES += [(FP32, shape, "qkv") for shape in SMALL + [(129, 65, 64), (63, 515, 128)] * GPU]
CASES += [(torch.float16, (999, 515, 64), "qkv")] * GPU


def draw(shape: tuple[int, int, int], dtype: torch.dtype, given: str = "qkv") -> list[Tensor | None]:
    """q, k, v and their tangents; those not given are None."""
    rows, keys, width = shape
    sizes = [(2, 2, length, width) for length in (rows, keys, keys)]
    q, k, v, *tangents = (torch.randn(size).to(DEVICE, dtype) for size in sizes + sizes)
    return [q, k, v, *(x if name in given else None for name, x in zip("qkv", tangents, strict=True))]


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by PyTorch's operators, each rounding to the inputs' dtype."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def plain(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v, *tangents = tensors
    tangents = tuple(
        torch.zeros_like(x) if t is None else t for x, t in zip((q, k, v), tangents, strict=True)
    )
    return torch.func.jvp(naive, (q, k, v), tangents)


@pytest.mark.parametrize(
    "portable", [False, True] if GPU else [True], ids=lambda x: "portable" if x else "own"
)
@pytest.mark.parametrize(("dtype", "shape", "given"), CASES)
def test_output_and_tangent(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    given: str,
    portable: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = draw(shape, dtype, given)
    if portable:
        monkeypatch.setattr(flash_jvp_triton, "HOPPER_WIDTHS", ())
    elif flash_jvp_triton.form([None if x is None else x.transpose(1, 2) for x in tensors]) is not None:
        pytest.skip("this GPU has no kernel of its own for this case")
    o, lse, do = flash_jvp_triton.attention(*tensors)
    true_o, true_lse, true_do = reference.attention(*widen(tensors))
    plain_o, plain_do = plain(*tensors)
    # at most twice what PyTorch loses at this precision; where that is almost nothing (one key: o is v),
    # roundings of the result
    rounding = ROUNDINGS[dtype] * torch.finfo(dtype).eps
    assert error(o, true_o) <= max(2 * error(plain_o, true_o), rounding)
    # scores are fp32 sums of exact products whatever the dtype, up to a few dozen before they are scaled
    assert (lse - true_lse).abs().max() < 2e-5
    assert (do is None) == (true_do is None)
    # with one key the weights cannot change: the tangents along q and k are zero
    if do is not None and true_do.norm() > 0:
        assert error(do, true_do) <= max(2 * error(plain_do, true_do), rounding)
    elif do is not None:
        assert do.abs().max() <= 8 * rounding


@pytest.mark.parametrize("width", [64, 128])
def test_wider_heads_and_other_layouts(width: int) -> None:
    tensors = draw((5, 40, width), torch.float32)
    # every second row of a wider tensor: neither packed nor tokens first
    tensors[0] = torch.randn(2, 2, 10, 2 * width, device=DEVICE)[:, :, ::2, width:]
    _, _, do = flash_jvp_triton.attention(*tensors)
    # fp32 sums in another order
    assert error(do, reference.attention(*widen(tensors))[2]) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [*((dtype, shape) for dtype in (BF16, FP32) for shape in SMALL), *[(BF16, (999, 515, 128))] * GPU],
)
def test_gradients(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    primals = draw(shape, dtype)[:3]
    grad = torch.randn_like(primals[0])
    got = differentiate(attention, primals, grad)
    truth = differentiate(naive, widen(primals), grad.double())
    lost = differentiate(naive, primals, grad)
    # a gradient may vanish (one key: that of q and k); what is left is rounding of the others' size
    size = max(x.norm() for x in truth)
    for ours, plain_grad, true_grad in zip(got, lost, truth, strict=True):
        assert (ours.double() - true_grad).norm() <= allowed(plain_grad, true_grad, size, dtype)


def test_large_negative_scores_leave_gradients_finite() -> None:
    # exp(-lse) overflows for the padding keys of the last block
    q = torch.full((1, 1, 3, 32), -30.0, device=DEVICE)
    k = torch.full((1, 1, 5, 32), 30.0, device=DEVICE)
    grads = differentiate(attention, [q, k, torch.randn_like(k)], torch.randn_like(q))
    assert all(x.isfinite().all() for x in grads)


def test_dual_numbers_reach_the_kernels() -> None:
    q, k, v, dq, dk, dv = draw((17, 20, 32), torch.float32)
    with torch.no_grad(), forward_ad.dual_level():
        out = attention(*map(forward_ad.make_dual, (q, k, v), (dq, dk, dv)))
        o, do = forward_ad.unpack_dual(out)
    wanted = flash_jvp_triton.attention(q, k, v, dq, dk, dv)
    assert torch.equal(o, wanted[0])
    assert torch.equal(do, wanted[2])


@pytest.mark.parametrize(
    ("shapes", "dtype", "message"),
    [
        (((1, 2, 3, 48), (1, 2, 3, 48)), torch.float32, "head width 48"),
        (((1, 2, 3, 32), (1, 2, 3, 32)), torch.float64, "float64"),
        (((1, 2, 3, 32), (1, 1, 3, 32)), torch.float32, "q's batch, heads"),
        (((1, 2, 3, 32), (1, 2, 0, 32)), torch.float32, "at least one token"),
    ],
)
def test_refuses_what_the_kernels_cannot_do(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype, message: str
) -> None:
    q, k = (torch.zeros(shape, dtype=dtype, device=DEVICE) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        attention(q, k, k)


def test_traced_pass_computes_anew_for_other_inputs() -> None:
    def derive(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            duals = (forward_ad.make_dual(x, t) for x, t in zip(tensors[:3], tensors[3:], strict=True))
            return tuple(forward_ad.unpack_dual(attention(*duals)))

    graph = make_fx(derive)(*draw(SMALL[1], FP32))
    other = draw(SMALL[1], FP32)
    for ours, theirs in zip(graph(*other), derive(*other), strict=True):
        assert torch.equal(ours, theirs)
