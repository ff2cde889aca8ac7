from functools import partial

import pytest
import torch
from torch import Tensor

from distill.compiled import compile_units
from distill.jvp import jvp
from distill.remat import rematerialize
from tests.distill.networks import build_network
from turbodiffusion.attention import Attention
from turbodiffusion.models.wan import WanModel

SLA = {"name": "sla", "ratio": 0.5, "block_q": 8, "block_k": 4}
# captures and differentiates as the default does, without compiling C++ for a minute
COMPILER = partial(torch.compile, backend="aot_eager")


def build(attention: Attention | None = None) -> WanModel:
    torch.manual_seed(0)
    return build_network(attention=attention)


def inputs(frames: int = 3) -> tuple[Tensor, ...]:
    x, dx = (torch.randn(2, 4, frames, 4, 6) for _ in range(2))
    return x, torch.tensor([300.0, 800.0]), torch.randn(2, 5, 12), dx, torch.tensor([1.0, -2.0])


def tangent(model: WanModel, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    x, time, context, dx, dtime = given
    return jvp(model, (x, time), (dx, dtime), context)


def assert_alike(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(got, wanted, strict=True):
        # the compiler decomposes a few operations: fp32 rounding
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


@pytest.mark.parametrize("mode", ["none", "block"])
def test_compiled_units_give_the_tangent_of_the_plain_ones(mode: str) -> None:
    plain, model = build(), build()
    rematerialize(model.shard_units(), mode)
    compile_units(model.shard_units(), COMPILER)
    # of two shapes, for which two graphs are made
    for given in (inputs(), inputs(frames=1), inputs()):
        assert_alike(tangent(model, given), tangent(plain, given))
    shared = model.blocks[0].forward.tangent
    assert shared is model.blocks[1].forward.tangent
    assert len(shared.graphs) == 2


def test_graphs_see_how_weights_change() -> None:
    plain, model, given = build(), build(), inputs()
    compile_units(model.shard_units(), COMPILER)
    tangent(model, given)
    for each in (plain, model):
        torch.nn.init.constant_(each.blocks[1].ffn[0].bias, 3.0)
    assert_alike(tangent(model, given), tangent(plain, given))


def test_without_tangents_it_is_differentiated_as_before() -> None:
    plain, model, given = build(), build(), inputs()
    compile_units(model.shard_units(), COMPILER)
    tangent(model, given)
    for each in (plain, model):
        each(*given[:3]).square().mean().backward()
    theirs, ours = (torch.cat([p.grad.flatten() for p in each.parameters()]) for each in (plain, model))
    # fp32 rounding, of sums over all tokens
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_sparse_attention_passes_tangents_uncompiled() -> None:
    plain, model, given = build(SLA), build(SLA), inputs()
    compile_units(model.shard_units(), COMPILER)
    assert model.blocks[0].forward.tangent is None
    for ours, theirs in zip(tangent(model, given), tangent(plain, given), strict=True):
        assert torch.equal(ours, theirs)
