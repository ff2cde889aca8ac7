"""The tangent of the whole network: the one number that continuous-time distillation cannot do without."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.jvp import jvp
from kernels.reference import block_map
from tests.distill.networks import build_network

DIRECTIONS = {"x": (True, False), "time": (False, True), "x_and_time": (True, True)}


def draw_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, 4, 3, 4, 6, dtype=dtype),
        torch.tensor([300.0, 800.0], dtype=dtype),
        torch.randn(2, 5, 12),
    )


def draw_tangents(
    x: Tensor, time: Tensor, direction: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    # a millionth of time's range moves the network as much as a thousandth of x's: times run to 1000
    along_x, along_time = direction
    return torch.randn_like(x) if along_x else None, 100 * torch.randn_like(time) if along_time else None


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.fixture
def everything_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that the network takes in fp32 run in fp64, lest their rounding drown the differences."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.usefixtures("everything_fp64")
def test_tangent_equals_central_differences(direction: tuple[bool, bool]) -> None:
    model = build_network().double()
    x, time, context = draw_inputs(torch.float64)
    tangents = draw_tangents(x, time, direction)
    _, tangent = jvp(model, (x, time), tangents, context)
    dx, dtime = (0 if t is None else t for t in tangents)

    def difference(h: float) -> Tensor:
        with torch.no_grad():
            return (
                model(x + h * dx, time + h * dtime, context) - model(x - h * dx, time - h * dtime, context)
            ) / (2 * h)

    errors = [relative_error(tangent, difference(h)) for h in (1e-3, 1e-4, 1e-5)]
    assert tangent.norm() > 1e-3
    # central differences are wrong by h^2 until rounding, 1e-16 / h, takes over
    assert errors[1] < 0.02 * errors[0]
    assert min(errors) < 1e-6


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.usefixtures("everything_fp64")
def test_tangent_of_sparse_linear_attention_equals_central_differences(direction: tuple[bool, bool]) -> None:
    model = build_network().double()
    # 18 tokens: five blocks of keys, of which two
    model.set_attention({"name": "sla", "ratio": 0.4, "block_q": 8, "block_k": 4})
    maps: list[Tensor] = []

    def note(core: nn.Module, given: tuple[Tensor, Tensor, Tensor]) -> None:
        maps.append(block_map(*given[:2], ratio=0.4, block_q=8, block_k=4))

    for block in model.blocks:
        nn.init.normal_(block.self_attn.core.proj_l.weight, std=0.3)
        block.self_attn.core.register_forward_pre_hook(note)
    x, time, context = draw_inputs(torch.float64)
    tangents = draw_tangents(x, time, direction)
    _, tangent = jvp(model, (x, time), tangents, context)
    dx, dtime = (0 if t is None else t for t in tangents)
    h = 1e-5
    with torch.no_grad():
        ahead, behind = (model(x + e * dx, time + e * dtime, context) for e in (h, -h))
    # the derivative holds the choice fixed, so it must not change between these points
    assert all(torch.equal(maps[i], maps[i % 2]) for i in range(6))
    assert tangent.norm() > 1e-3
    # wrong by h^2, and by rounding of 1e-16 / h
    assert relative_error(tangent, (ahead - behind) / (2 * h)) < 1e-6


def test_result_equals_the_plain_pass() -> None:
    model = build_network()
    x, time, context = draw_inputs(torch.float32)
    velocity, _ = jvp(model, (x, time), draw_tangents(x, time, (True, True)), context)
    # another order of fp32 sums in attention
    assert relative_error(velocity, model(x, time, context)) < 1e-6


class MathAttention(nn.Module):
    """PyTorch's own attention by the one backend that has a forward-mode rule."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)


def test_tangent_equals_functorch_through_math_attention() -> None:
    model = build_network(clip_tokens=257)
    x, time, context = draw_inputs(torch.float32)
    clip = torch.randn(2, 257, 1280)
    dx, dtime = draw_tangents(x, time, (True, True))

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        return model(x, time, context, clip=clip)

    _, tangent = jvp(velocity, (x, time), (dx, dtime))
    for block in model.blocks:
        block.self_attn.core, block.cross_attn.core = MathAttention(), MathAttention()
    _, wanted = torch.func.jvp(velocity, (x, time), (dx, dtime))
    # fp32 rounding through two blocks
    assert relative_error(tangent, wanted) < 1e-5


def test_bf16_tangent_is_as_good_as_math_attention() -> None:
    model = build_network()
    x, time, context = draw_inputs(torch.float32)
    tangents = draw_tangents(x, time, (True, True))
    _, truth = jvp(model, (x, time), tangents, context)
    model.bfloat16()
    _, tangent = jvp(model, (x, time), tangents, context)
    for block in model.blocks:
        block.self_attn.core, block.cross_attn.core = MathAttention(), MathAttention()
    _, plain = jvp(model, (x, time), tangents, context)
    # the weights' own rounding dominates; attention must not add as much again
    assert relative_error(tangent, truth) < 2 * relative_error(plain, truth)


def test_weights_receive_no_graph_and_ordinary_passes_keep_theirs() -> None:
    model = build_network()
    x, time, context = draw_inputs(torch.float32)
    velocity, tangent = jvp(model, (x, time), draw_tangents(x, time, (True, True)), context)
    assert not velocity.requires_grad
    assert not tangent.requires_grad
    model(x, time, context).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.library.custom_op("turbodiffusion_tests::double", mutates_args=())
def opaque_double(x: Tensor) -> Tensor:
    return 2 * x


def in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return 2 * x


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda x: 2 * x.detach(),
    "inference_mode": in_inference_mode,
    "custom_op": opaque_double,
}


@pytest.mark.parametrize("fn", LOSSES.values(), ids=LOSSES)
def test_a_lost_tangent_raises(fn: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3)
    with pytest.raises(RuntimeError, match=r"inference_mode.*custom op"):
        jvp(fn, (x,), (torch.ones_like(x),))


def test_no_tangent_given_raises() -> None:
    x = torch.randn(3)
    with pytest.raises(RuntimeError, match="None"):
        jvp(torch.sin, (x,), (None,))


def test_inference_mode_around_the_pass_raises() -> None:
    x = torch.randn(3)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        jvp(torch.sin, (x,), (torch.ones_like(x),))
