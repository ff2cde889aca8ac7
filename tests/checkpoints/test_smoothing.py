"""Channels divided where they are made, and multiplied where they are read: nothing but roundings changes."""

import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from turbodiffusion.checkpoints.quantised import linear_layers
from turbodiffusion.checkpoints.smoothing import Smoothing, divisible, divisors
from turbodiffusion.checkpoints.sources import Entry
from turbodiffusion.models.int8 import Int8Linear
from turbodiffusion.models.wan import WanModel

MakeNetwork = Callable[[str], tuple[WanModel, str]]
SLA = {"name": "sla", "ratio": 0.5, "block_q": 16, "block_k": 16}


@torch.no_grad()
def velocity(network: WanModel, task: str) -> Tensor:
    generator, config = torch.Generator().manual_seed(1), network.config

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).double()

    tokens = config["clip_tokens"]
    per_token = torch.linspace(0, 900, 2 * 2 * 2)[None].double()
    return network(
        draw(1, config["in_channels"], 2, 4, 4),
        per_token if task == "ti2v" else torch.tensor([500.0]).double(),
        draw(1, 3, config["text_dim"]),
        clip=draw(1, tokens, 1280) if tokens else None,
    )


def smoothing(network: WanModel, spread: float) -> Smoothing:
    """Of layers that read channels as unlike as that, in powers of 2."""
    floats = {name: Entry.of(tensor) for name, tensor in network.state_dict().items()}
    largest = {
        layer: 2 ** (spread * torch.randn(floats[f"{layer}.weight"].shape[1]))
        for layer in linear_layers(floats)
    }
    return Smoothing(network.config, floats, largest, 0.5)


@pytest.mark.parametrize("task", ["t2v", "i2v_clip", "ti2v", "sla"])
def test_a_network_computes_what_it_did(
    task: str, make_network: MakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, _ = make_network("t2v" if task == "sla" else task)
    if task == "sla":
        network.set_attention(SLA)
        for block in network.blocks:
            torch.nn.init.normal_(block.self_attn.core.proj_l.weight)
    network.double()
    changed = smoothing(network, 3.0)
    # all of the network in fp64: also what it computes in fp32 whatever it is given
    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)
    before = velocity(network, task)
    old = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for name, tensor in network.state_dict().items():
        tensor.copy_(changed(name, tensor))
    after = velocity(network, task)
    assert after.dtype == torch.float64
    # 2^-53 of numbers that divisors up to 2^8, and sums of 128 of random signs, made larger
    assert (after - before).norm() < 1e-10 * before.norm()
    readers = {layer for channels in divisible(network.config) for layer in channels.readers}
    assert all(
        not torch.equal(network.state_dict()[f"{layer}.weight"], old[f"{layer}.weight"]) for layer in readers
    )
    # all layers but what reads a GELU's outputs, and those of a linear branch
    kept = {"ffn.2", "self_attn.o"} if task == "sla" else {"ffn.2"}
    floats = {name: Entry.of(tensor) for name, tensor in old.items()}
    assert {layer.split(".", 2)[2] for layer in linear_layers(floats).keys() - readers} == kept


def test_strength_divides_what_is_large_between_what_is_read_and_weights() -> None:
    read, weights = torch.tensor([1.0, 16.0, 1.0]), torch.tensor([1.0, 1.0, 4.0])
    for strength in (0.0, 0.25, 0.5, 1.0):
        by = divisors(read, weights, strength)
        wanted = torch.tensor([1.0, 16**strength, 4 ** (strength - 1)], dtype=torch.float64)
        # a geometric mean of 1; powers and logarithms of fp64, a few roundings each
        torch.testing.assert_close(by, wanted / wanted.prod() ** (1 / 3), rtol=1e-12, atol=0)


def test_outliers_cost_less_where_they_are_divided() -> None:
    torch.manual_seed(0)
    network = WanModel(dim=128, ffn_dim=64, heads=1, layers=1)
    block = network.blocks[0]
    # a norm makes a channel 50 times as large as others
    with torch.no_grad():
        block.norm3.weight[7] = 50
    x = torch.randn(400, 128)

    def error() -> float:
        y, q = block.norm3(x), block.cross_attn.q
        return ((Int8Linear.from_linear(q)(y) - q(y)).norm() / q(y).norm()).item()

    with torch.no_grad():
        before = error()
        largest = {
            f"blocks.0.{n}": torch.ones(m.in_features)
            for n, m in block.named_modules()
            if hasattr(m, "in_features")
        }
        largest["blocks.0.cross_attn.q"] = block.norm3(x).abs().amax(0)
        floats = {name: Entry.of(tensor) for name, tensor in network.state_dict().items()}
        changed = Smoothing(network.config, floats, largest, 0.5)
        for name, tensor in network.state_dict().items():
            tensor.copy_(changed(name, tensor))
        after = error()
    # the largest of a row was 50 times what others are, and is sqrt(50) times; as much comes to one column of
    # weights, whose rounding had next to no part: sqrt(2 / 50) of the error is left, or 0.2
    assert after < 0.5 * before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_entries_are_the_tensors_as_they_are_stored_but_for_modulation(
    dtype: torch.dtype, make_network: MakeNetwork
) -> None:
    network, _ = make_network("t2v")
    changed = smoothing(network, 1.0)
    stored = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
    entries = changed.entries({name: Entry.of(tensor) for name, tensor in stored.items()})
    for name, entry in entries.items():
        is_fp32 = name.startswith("blocks.") and name.endswith(".modulation")
        assert entry.dtype == (torch.float32 if is_fp32 else dtype)
        got = entry.load()
        assert (got.dtype, tuple(got.shape)) == (entry.dtype, tuple(stored[name].shape))
        wanted = changed(name, stored[name].double())
        # rounded once or, rows and columns both being changed, twice
        torch.testing.assert_close(got.double(), wanted, rtol=2 * torch.finfo(entry.dtype).eps, atol=1e-7)


def test_one_weight_is_there_at_a_time(make_network: MakeNetwork) -> None:
    network, _ = make_network("t2v")
    alive, most = set(), []

    def read(tensor: Tensor) -> Tensor:
        most.append(len(alive))
        copy = tensor.clone()
        alive.add(id(copy))
        weakref.finalize(copy, alive.discard, id(copy))
        return copy

    floats = {
        name: Entry(tuple(tensor.shape), tensor.dtype, partial(read, tensor))
        for name, tensor in network.state_dict().items()
    }
    changed = Smoothing(
        network.config,
        floats,
        {layer: torch.ones(floats[f"{layer}.weight"].shape[1]) for layer in linear_layers(floats)},
        0.5,
    )
    for entry in changed.entries(floats).values():
        entry.load()
    # weights but ffn.2's once to find what they are multiplied by, and all tensors once again
    assert most == [0] * (18 + len(floats))
