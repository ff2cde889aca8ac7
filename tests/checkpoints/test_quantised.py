import math
import weakref

import pytest
import torch

from turbodiffusion.checkpoints.quantised import (
    FP8,
    INT8,
    TILES,
    EightBits,
    dequantise,
    dequantised,
    linear_layers,
    quantise_tiles,
    quantised,
    settled,
    stored_layers,
)
from turbodiffusion.checkpoints.sources import Entry
from turbodiffusion.errors import UserError
from turbodiffusion.models.int8 import to_eight_bits
from turbodiffusion.models.wan import WanModel

SHAPES = [(128, 128), (256, 384), (300, 130), (1, 257)]


def random_pair(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    tiles = [-(-size // 128) for size in shape]
    return torch.randint(-128, 128, shape, dtype=torch.int8), torch.rand(tiles)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_is_its_integer_times_the_scale_of_its_tile(shape: tuple[int, int]) -> None:
    weight, scale = random_pair(shape)
    rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    # one product of fp32 numbers: exact to the bit
    assert torch.equal(dequantise(weight, scale), weight.float() * scale[rows // 128, columns // 128])


def tiles_of(matrix: torch.Tensor) -> list[torch.Tensor]:
    return [part for rows in matrix.split(128) for part in rows.split(128, dim=1)]


def by_the_formula(tile: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Counts in 128ths of the largest before they are rounded, and the scale, in fp64."""
    largest = max(1e-8, tile.double().abs().max().item())
    return tile.double() * (128 / largest), largest / 128


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_are_the_published_formula_to_the_bit_where_fp32_is_exact(shape: tuple[int, int]) -> None:
    # eighths up to 8 in every tile: all products are exact, and many halves are met, which go to the even
    weight = torch.randint(-63, 64, shape) / 8 / 16
    for tile in tiles_of(weight):
        tile[0, 0] = -0.5
    integers, scale = quantise_tiles(weight)
    assert (integers.dtype, scale.dtype, integers.is_contiguous()) == (torch.int8, torch.float32, True)
    for tile, got, step in zip(tiles_of(weight), tiles_of(integers), scale.flatten(), strict=True):
        counts, expected = by_the_formula(tile)
        assert torch.equal(got.double(), counts.round().clamp(-128, 127))
        assert step == expected


def test_tiles_of_any_numbers_differ_from_the_formula_only_at_a_half() -> None:
    weight = torch.randn(300, 500).bfloat16()
    integers, scale = quantise_tiles(weight)
    for tile, got, step in zip(tiles_of(weight), tiles_of(integers), scale.flatten(), strict=True):
        counts, expected = by_the_formula(tile)
        # one division by a power of two
        assert step == pytest.approx(expected, rel=2**-24)
        off = (got - counts.clamp(max=127)).abs()
        # a quotient and a product of up to 128, each rounded to fp32
        assert off.max() <= 0.5 + 128 * 2 * 2**-24


def test_the_largest_saturates_where_positive_and_zeros_have_a_step() -> None:
    weight = torch.zeros(128, 256)
    weight[3, 5], weight[7, 9] = 0.3, -0.3
    integers, scale = quantise_tiles(weight)
    assert (integers[3, 5], integers[7, 9], integers.int().abs().sum()) == (127, -128, 255)
    assert scale[0, 1] == torch.tensor(1e-8) / 128


def test_numbers_more_precise_than_bf16_are_rounded_to_it_first() -> None:
    weight = torch.randn(128, 128)
    assert all(map(torch.equal, quantise_tiles(weight), quantise_tiles(weight.bfloat16())))


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_survive_a_round_trip_to_the_bit(shape: tuple[int, int]) -> None:
    weight, scale = random_pair(shape)
    for tile in tiles_of(weight):
        tile[0, 0] = -128
    # powers of two, so that bf16 holds the products
    scale = torch.exp2((8 * scale).round() - 12)
    again = quantise_tiles(dequantise(weight, scale))
    assert all(map(torch.equal, again, (weight, scale)))


def test_a_channel_has_its_own_scale() -> None:
    weight, scale = torch.randint(-127, 128, (5, 7), dtype=torch.int8), torch.rand(5)
    rows = [integers.float() * step for integers, step in zip(weight, scale, strict=True)]
    assert torch.equal(dequantise(weight, scale), torch.stack(rows))


@pytest.mark.parametrize(
    "options", [{}, {"in_channels": 36, "clip_tokens": 257}, {"attention": {"name": "sla"}}]
)
def test_what_files_quantise_is_what_networks_quantise(options: dict[str, object]) -> None:
    with torch.device("meta"):
        model = WanModel(dim=32, ffn_dim=48, heads=2, layers=2, **options)
    floats = {name: Entry.of(tensor) for name, tensor in model.state_dict().items()}
    sizes = {name: model.get_submodule(name).weight.numel() for name in linear_layers(floats)}
    assert linear_layers(floats) == sizes
    assert to_eight_bits(model) == list(sizes)
    eight = quantised(floats, list(sizes), INT8)
    described = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
    assert {name: (entry.shape, entry.dtype) for name, entry in eight.items()} == described


@pytest.mark.parametrize(("scheme", "leaf"), [(INT8, "weight"), (TILES, "int8_weight")])
def test_entries_become_pairs_and_floats_again(scheme: str, leaf: str) -> None:
    weight = torch.randn(300, 130)
    floats = {f"{name}.weight": Entry.of(weight) for name in "ab"}
    eight = quantised(floats, ["a"], scheme)
    assert set(eight) == {f"a.{leaf}", "a.scale", "b.weight"}
    assert stored_layers(eight) == {"a": scheme}
    for name, entry in eight.items():
        loaded = entry.load()
        assert (tuple(loaded.shape), loaded.dtype) == (entry.shape, entry.dtype), name
    back = dequantised(eight, torch.float32)
    assert set(back) == {"a.weight", "b.weight"}
    pair = eight[f"a.{leaf}"].load(), eight["a.scale"].load()
    assert torch.equal(back["a.weight"].load(), dequantise(*pair))


def test_weights_are_let_go_and_scales_are_found_once() -> None:
    alive, read = set(), []

    def load() -> torch.Tensor:
        read.append(len(alive))
        tensor = torch.randn(8, 4)
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        return tensor

    floats = {f"{i}.weight": Entry((8, 4), torch.float32, load) for i in range(5)}
    eight = quantised(floats, [str(i) for i in range(5)], INT8)
    for i in range(5):
        eight[f"{i}.weight"].load(), eight[f"{i}.scale"].load()
    assert read == [0] * 5


@pytest.mark.parametrize("scheme", [INT8, TILES])
def test_decibels_are_those_of_evenly_spread_errors(scheme: str) -> None:
    # bf16, so that tiles do not round first
    weight = torch.randn(512, 512).bfloat16()
    got = EightBits("a", Entry.of(weight), scheme).decibels()
    blocks = weight.double().unsqueeze(1) if scheme == INT8 else torch.stack(tiles_of(weight.double()))
    step = blocks.abs().amax((1, 2)) / (127 if scheme == INT8 else 128)
    # rounding to a step adds a variance of its square / 12; of 2^18 errors that is known to 0.02 dB, thrice
    assert got == pytest.approx(
        10 * math.log10(12 * weight.double().square().mean() / step.square().mean()), abs=0.06
    )


def test_a_weight_of_zeros_has_no_error_and_one_of_nan_no_eight_bits() -> None:
    assert EightBits("a", Entry.of(torch.zeros(3, 4)), INT8).decibels() == math.inf
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match="layer a holds NaN or infinities"):
            EightBits("layer a", Entry.of(torch.full((3, 4), value)), INT8).decibels()


@pytest.mark.parametrize(
    ("asked", "stored", "runs"),
    [
        *(("none", {}, "none"), ("int8", {}, "int8"), ("auto", {}, "none")),
        *(("none", {"a": INT8}, "none"), ("int8", {"a": INT8}, "int8"), ("auto", {"a": INT8}, "int8")),
        *(("fp8", {}, "fp8"), ("none", {"a": FP8}, "none"), ("auto", {"a": FP8}, "fp8")),
        *(("fp8", {"a": INT8}, "fp8"), ("int8", {"a": FP8}, "int8"), ("auto", {"a": FP8, "b": INT8}, "none")),
        *(("none", {"a": TILES}, "none"), ("int8", {"a": TILES}, "int8"), ("auto", {"a": TILES}, "none")),
    ],
)
def test_how_a_network_runs(asked: str, stored: dict[str, str], runs: str) -> None:
    assert settled(asked, stored) == runs


@pytest.mark.parametrize(("integers", "scales"), [("int8_weight", "scale"), ("weight", "weight_scale_inv")])
def test_both_spellings_become_one_weight_in_the_wanted_dtype(integers: str, scales: str) -> None:
    weight, scale = random_pair((300, 130))
    bias = torch.randn(300)
    stored = {f"a.{integers}": weight, f"a.{scales}": scale, "a.bias": bias, "norm.weight": torch.ones(3)}
    entries = {name: Entry.of(tensor) for name, tensor in stored.items()}
    plain = dequantised(entries, torch.bfloat16)
    assert set(plain) == {"a.weight", "a.bias", "norm.weight"}
    assert (plain["a.weight"].dtype, plain["a.weight"].shape) == (torch.bfloat16, (300, 130))
    assert torch.equal(plain["a.weight"].load(), dequantise(weight, scale).bfloat16())
    assert torch.equal(plain["a.bias"].load(), bias)


@pytest.mark.parametrize(
    "stored",
    [
        {"a.int8_weight": torch.ones(4, 4, dtype=torch.int8)},
        {"a.int8_weight": torch.ones(129, 4, dtype=torch.int8), "a.scale": torch.ones(1, 1)},
        {"a.int8_weight": torch.ones(4, 4), "a.scale": torch.ones(1, 1)},
        {"a.scale": torch.ones(4)},
        {"a.weight": torch.ones(4, 4, dtype=torch.int8), "a.scale": torch.ones(3)},
        {"a.weight": torch.ones(4, 4), "a.scale": torch.ones(4)},
    ],
    ids=["no scale", "too few tiles", "no integers in tiles", "no weight", "too few rows", "no integers"],
)
def test_what_is_no_quantised_weight_is_refused(stored: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UserError, match="quantised layer a has"):
        dequantised({name: Entry.of(tensor) for name, tensor in stored.items()}, torch.float32)
