"""Activation checkpointing changes what is kept, and nothing else."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from distill.compiled import compile_units
from distill.jvp import jvp
from distill.remat import MODES, rematerialize
from turbodiffusion.attention import DENSE, Attention
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel

RECOMPUTING = [mode for mode in MODES if mode != "none"]


SLA = {"name": "sla", "ratio": 0.3, "block_q": 8, "block_k": 8}


def build(mode: str, attention: Attention = DENSE) -> WanModel:
    torch.manual_seed(0)
    model = WanModel(
        dim=64, ffn_dim=80, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=12, text_length=6,
        freq_dim=16, attention=attention,
    )  # fmt: skip
    # a zero head would hide every gradient but its own
    torch.nn.init.normal_(model.head.head.weight)
    rematerialize(model.shard_units(), mode)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 3, 8, 12, generator=generator)
    return x, torch.tensor([300.0, 800.0]), torch.randn(2, 5, 12, generator=generator)


def gradients(model: WanModel) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    model(*inputs()).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def kept_bytes(model: WanModel, *, grad: bool) -> int:
    """What the allocator gave a forward and did not get back while its result was alive."""
    given = inputs()
    with (
        torch.set_grad_enabled(grad),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
    ):
        out = model(*given)
    assert out.requires_grad == grad
    return sum(event.self_cpu_memory_usage for event in seen.events())


@pytest.mark.parametrize("attention", [DENSE, SLA], ids=["dense", "sla"])
@pytest.mark.parametrize("mode", RECOMPUTING)
def test_gradients_are_the_same_to_the_bit(mode: str, attention: Attention) -> None:
    assert same(gradients(build(mode, attention)), gradients(build("none", attention)))


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_a_pass_with_dual_numbers_is_the_plain_one(mode: str) -> None:
    x, time, context = inputs()
    results = [jvp(build(m), (x, time), (torch.ones_like(x), time), context) for m in (mode, "none")]
    assert same(*results)


def test_less_is_kept_the_more_is_computed_again() -> None:
    kept = {mode: kept_bytes(build(mode), grad=True) for mode in MODES}
    tokens = torch.Size((2, 3 * 4 * 6, 64)).numel() * 4
    # two blocks, each with a self- and a cross-attention; log-sum-exps are a 32nd of their size
    assert kept["keep_attention"] - kept["block"] == 4 * tokens * (1 + 1 / 32)
    assert kept["none"] > 4 * kept["keep_attention"]


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_without_a_graph_nothing_is_kept(mode: str) -> None:
    assert kept_bytes(build(mode), grad=False) == kept_bytes(build("none"), grad=False)


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_a_copy_computes_with_its_own_weights(mode: str) -> None:
    model = build(mode)
    copy = deepcopy(model)
    assert same(gradients(copy), gradients(model))
    torch.nn.init.zeros_(model.blocks[0].ffn[0].weight)
    assert same(gradients(copy), gradients(build(mode)))


def test_names_stay_and_none_takes_it_back() -> None:
    model, plain = build("block"), build("none")
    assert list(model.state_dict()) == list(plain.state_dict())
    rematerialize(model.shard_units(), "none")
    assert kept_bytes(model, grad=True) == kept_bytes(plain, grad=True)


@pytest.mark.parametrize("attention", [DENSE, SLA], ids=["dense", "sla"])
@pytest.mark.parametrize("mode", RECOMPUTING)
def test_it_composes_with_compile(mode: str, attention: Attention) -> None:
    model = build(mode, attention)
    compile_units(model.shard_units(), partial(torch.compile, backend="aot_eager"))
    for got, wanted in zip(gradients(model), gradients(build("none", attention)), strict=True):
        # the compiler decomposes a few operations: fp32 rounding, of sums over 72 tokens
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    assert kept_bytes(model, grad=True) < 0.5 * kept_bytes(build("none", attention), grad=True)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UserError, match="keep_attention"):
        build("attention")
