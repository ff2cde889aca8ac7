import pytest
import torch

from turbodiffusion.checkpoints.quantised import dequantise, dequantised
from turbodiffusion.checkpoints.sources import Entry
from turbodiffusion.errors import UserError

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
    ],
    ids=["no scale", "too few scales", "not integers"],
)
def test_what_is_no_tiled_weight_is_refused(stored: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UserError, match="quantised layer a has"):
        dequantised({name: Entry.of(tensor) for name, tensor in stored.items()}, torch.float32)
