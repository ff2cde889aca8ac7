"""Networks in 8 bits, from files with floats, with our int8 or fp8 and with published tiles."""

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbodiffusion.checkpoints import detect, load_network, save
from turbodiffusion.checkpoints.loading import fill
from turbodiffusion.checkpoints.quantised import INT8, TILES, linear_layers, quantised
from turbodiffusion.checkpoints.sources import Entries, Entry
from turbodiffusion.errors import UserError
from turbodiffusion.models.int8 import LINEARS, to_eight_bits
from turbodiffusion.models.wan import WanModel

MakeNetwork = Callable[[str], tuple[WanModel, str]]
State = dict[str, Tensor]


def load(path: Path, quant: str, variant: str | None = None, dtype: torch.dtype = torch.float32) -> WanModel:
    return load_network(path, device="cpu", dtype=dtype, variant=variant, quant=quant).network


def is_same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def entries(state: State) -> Entries:
    return {name: Entry.of(tensor) for name, tensor in state.items()}


@torch.no_grad()
def velocity(network: WanModel) -> Tensor:
    generator, config = torch.Generator().manual_seed(1), network.config
    x = torch.randn(1, config["in_channels"], 2, 4, 4, generator=generator)
    return network(x, torch.tensor([500.0]), torch.randn(1, 3, config["text_dim"], generator=generator))


@pytest.mark.parametrize(("dtype", "quant"), [(torch.float32, "int8"), (torch.bfloat16, "fp8")])
def test_a_float_file_is_quantised_as_the_network_would_be(
    dtype: torch.dtype, quant: str, make_network: MakeNetwork, tmp_path: Path
) -> None:
    network, variant = make_network("t2v")
    # numbers that bf16 holds: those of a file are quantised as they are stored
    stored = {name: tensor.bfloat16() for name, tensor in network.state_dict().items()}
    save_file(stored, path := tmp_path / "a.safetensors")
    wanted = load(path, "none", variant, dtype)
    layers = to_eight_bits(wanted, quant=quant)
    loaded = load(path, quant, variant, dtype)
    assert len(layers) == 20
    assert is_same(loaded.state_dict(), wanted.state_dict())
    assert {loaded.state_dict()[f"{layer}.scale"].dtype for layer in layers} == {torch.float32}
    assert {loaded.state_dict()[f"{layer}.bias"].dtype for layer in layers} == {dtype}


@pytest.mark.parametrize("kind", LINEARS)
def test_what_was_quantised_is_saved_and_loaded_to_the_bit(
    kind: str, make_network: MakeNetwork, tmp_path: Path
) -> None:
    network, variant = make_network("i2v")
    every = linear_layers(entries(network.state_dict()))
    # one of a feed-forward pair, so that the GELU between them is fused in one block only
    some = [layer for layer in every if layer not in ("blocks.0.ffn.0", "blocks.1.ffn.2")]
    layers = to_eight_bits(network, some, kind)
    assert len(layers) == 18
    save(path := tmp_path / "a.safetensors", network, variant=variant)
    assert detect(path).quantised == dict.fromkeys(layers, kind)
    assert is_same(load_file(path), network.state_dict())
    for quant in ("auto", kind):
        again = load(path, quant)
        assert is_same(again.state_dict(), network.state_dict())
        assert torch.equal(velocity(again), velocity(network))


@pytest.mark.parametrize("quant", LINEARS)
def test_without_eight_bits_a_weight_is_its_numbers_times_their_scales(
    quant: str, make_network: MakeNetwork, tmp_path: Path
) -> None:
    network, variant = make_network("t2v")
    floats = network.state_dict()
    layers = to_eight_bits(network, quant=quant)
    eight = {layer: LINEARS[quant].quantise(floats[f"{layer}.weight"]) for layer in layers}
    save(path := tmp_path / "a.safetensors", network, variant=variant)
    wanted = floats | {f"{layer}.weight": q.float() * step.unsqueeze(1) for layer, (q, step) in eight.items()}
    assert is_same(load(path, "none").state_dict(), wanted)


def test_one_kind_of_eight_bits_is_asked_of_another(make_network: MakeNetwork, tmp_path: Path) -> None:
    network, variant = make_network("t2v")
    layers = to_eight_bits(network, quant="fp8")
    save(path := tmp_path / "a.safetensors", network, variant=variant)
    plain = load(path, "none")
    assert to_eight_bits(plain, layers, "int8") == layers
    assert is_same(load(path, "int8").state_dict(), plain.state_dict())


def test_tiles_run_as_floats_or_are_quantised_again(make_network: MakeNetwork, tmp_path: Path) -> None:
    network, variant = make_network("t2v")
    floats = entries(network.state_dict())
    # all but one layer of a kind
    layers = [layer for layer in linear_layers(floats) if layer != "blocks.1.ffn.2"]
    tiled = quantised(floats, layers, TILES)
    save_file({name: entry.load() for name, entry in tiled.items()}, path := tmp_path / "a.safetensors")
    plain = load(path, "auto", variant)
    assert is_same(plain.state_dict(), load(path, "none", variant).state_dict())
    assert to_eight_bits(plain, layers) == layers
    assert is_same(load(path, "int8", variant).state_dict(), plain.state_dict())


def test_at_most_one_weight_is_read_ahead_of_the_module() -> None:
    alive, most = set(), []
    with torch.device("meta"):
        network = WanModel(dim=32, ffn_dim=48, heads=2, layers=3)

    def read(shape: tuple[int, ...]) -> Tensor:
        most.append(len(alive))
        tensor = torch.randn(shape)
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        return tensor

    floats = {
        name: Entry(tuple(tensor.shape), torch.float32, lambda shape=tensor.shape: read(shape))
        for name, tensor in network.state_dict().items()
    }
    layers = to_eight_bits(network)
    fill(network, quantised(floats, layers, INT8), Path("x"), lambda name: ("cpu", torch.float32))
    # each once, and what was read before is gone when the next is asked for
    assert most == [0] * len(floats)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks.0.ffn.0.scale": torch.ones(3)}, "quantised layer blocks.0.ffn.0 has torch.int8 weights"),
        ({"blocks.0.ffn.0.scale": None}, "blocks.0.ffn.0.weight (64, 128) torch.int8"),
        ({"blocks.0.ffn.0.weight": None}, "has scale but no blocks.0.ffn.0.weight"),
        ({"blocks.0.ffn.0.weight": torch.ones(64, 128)}, "has torch.float32 weights"),
        (
            {"blocks.0.ffn.0.weight": torch.ones(64, 128).to(torch.float8_e5m2)},
            "has torch.float8_e5m2 weights",
        ),
        (
            {"head.head.weight": torch.ones(64, 128, dtype=torch.int8)},
            "head.head.weight (64, 128) torch.int8",
        ),
    ],
)
@pytest.mark.parametrize("quant", ["none", "auto"])
def test_a_damaged_file_is_told_in_a_sentence(
    change: dict[str, Tensor | None], said: str, quant: str, make_network: MakeNetwork, tmp_path: Path
) -> None:
    network, variant = make_network("t2v")
    to_eight_bits(network)
    state = network.state_dict() | change
    save_file({n: t for n, t in state.items() if t is not None}, path := tmp_path / "a.safetensors")
    with pytest.raises(UserError) as refused:
        load(path, quant, variant)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
