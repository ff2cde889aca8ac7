"""The command that puts checkpoints in 8 bits, run as its users run it."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tools import convert, inspect, quantize
from tools.calibration import watch_inputs, watch_outputs
from turbodiffusion.checkpoints import detect, load_network, save
from turbodiffusion.checkpoints.quantised import FP8, INT8, TILES, EightBits
from turbodiffusion.checkpoints.sources import Entry
from turbodiffusion.models.wan import WanModel
from turbodiffusion.variants import variants

ROOT = Path(__file__).resolve().parents[2]
SMALL_WORLD = ROOT / "assets" / "wan_tiny.safetensors"
LAYERS = {f"{kind}_attn.{x}" for kind in ("self", "cross") for x in "qkvo"} | {"ffn.0", "ffn.2"}

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WanModel:
    """A network of two blocks, one of whose layers has an outlier; it is a.safetensors, where we are."""
    monkeypatch.chdir(tmp_path)
    model = WanModel(dim=128, ffn_dim=192, heads=1, layers=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
        parameter.data = parameter.data.bfloat16().float()
    model.blocks[1].ffn[2].weight.data[:, 0] = 50
    row = variants()["wan2.1_t2v_1.3b"]
    save("a.safetensors", model, sampling=row.sampling.as_student(80.0), variant=row.name, history=[{"a": 1}])
    return model


def state(path: str, quant: str = "auto", variant: str | None = None) -> dict[str, torch.Tensor]:
    loaded = load_network(path, device="cpu", dtype=torch.float32, quant=quant, variant=variant)
    return loaded.network.state_dict()


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("quant", ["int8", "fp8"])
def test_a_quantised_file_has_the_numbers_of_quantising_at_load(
    quant: str, network: WanModel, run: Run
) -> None:
    code, said = run(quantize, "src=a.safetensors", "dst=b.safetensors", f"format={quant}")
    assert code == 0, said
    assert all(f" {layer} " in said for layer in LAYERS)
    assert "20 of 20 linear layers" in said
    assert is_same(state("b.safetensors"), state("a.safetensors", quant))
    one, other = detect("a.safetensors"), detect("b.safetensors")
    assert (other.sampling, other.variant, other.config) == (one.sampling, one.variant, one.config)
    deed = {"quantised": "a.safetensors", "from": "ours", "quant": quant, "kept": []}
    assert list(other.metadata.history) == [{"a": 1}, deed]
    assert f"{quant}, 20 of 20 linear layers" in " ".join(run(inspect, "ckpt=b.safetensors")[1].split())


def test_layers_are_kept_by_budget_and_by_name(network: WanModel, run: Run) -> None:
    words = ("src=a.safetensors", "dst=b.safetensors", "budget=35", "keep=[blocks.0.ffn, self_attn.q]")
    code, said = run(quantize, *words)
    assert code == 0, said
    # normal numbers in rows of 128 end near 2.9: 127 sqrt(12) / 2.9, 44 dB.  Those of the last ffn.2 have 50
    # beside them, a step of 50 / 127: 10 log10((50^2 + 191) / 192 * 12 / step^2), 30 dB
    kept = {"blocks.0.ffn.0", "blocks.0.ffn.2", "blocks.0.self_attn.q", "blocks.1.self_attn.q"}
    kept.add("blocks.1.ffn.2")
    deed = detect("b.safetensors").metadata.history[-1]
    assert deed["kept"] == sorted(kept)
    stored = load_file("b.safetensors")
    assert {name for name in LAYERS_OF_BLOCKS if stored[f"{name}.weight"].dtype != torch.int8} == kept
    assert all(torch.equal(stored[f"{name}.weight"], network.state_dict()[f"{name}.weight"]) for name in kept)
    assert not any(f"{name}.scale" in stored for name in kept)


LAYERS_OF_BLOCKS = {f"blocks.{block}.{layer}" for block in range(2) for layer in LAYERS}


def test_the_published_form_has_its_names_and_shapes(network: WanModel, run: Run) -> None:
    words = ("src=a.safetensors", "dst=turbowan-quant.pth", "format=turbodiffusion")
    code, said = run(quantize, *words)
    assert code == 0, said
    assert "can not say that it is a student's" in said
    stored = torch.load("turbowan-quant.pth", weights_only=True)
    weight, scale = (stored.pop(f"blocks.0.ffn.0.{leaf}") for leaf in ("int8_weight", "scale"))
    assert (weight.shape, weight.dtype, scale.shape, scale.dtype) == (
        (192, 128),
        torch.int8,
        (2, 1),
        torch.float32,
    )
    assert "blocks.0.ffn.0.weight" not in stored
    assert stored["patch_embedding.weight"].shape == (128, 64)
    variant = "wan2.1_t2v_1.3b"
    report = detect("turbowan-quant.pth", variant=variant)
    assert (report.format, set(report.quantised.values())) == ("turbodiffusion", {"tiles"})
    # quantised once more at load or by the tool: the same
    code, said = run(quantize, "src=turbowan-quant.pth", "dst=c.safetensors", f"variant={variant}")
    assert code == 0, said
    assert is_same(state("c.safetensors"), state("turbowan-quant.pth", "int8", variant))


@pytest.mark.parametrize("quant", ["int8", "fp8"])
def test_converting_undoes_eight_bits(quant: str, network: WanModel, run: Run) -> None:
    assert run(quantize, "src=a.safetensors", "dst=b.safetensors", f"format={quant}")[0] == 0
    assert run(convert, "src=b.safetensors", "dst=c.safetensors", "dtype=float32")[0] == 0
    assert not detect("c.safetensors").quantised
    assert is_same(state("c.safetensors"), state("b.safetensors", "none"))


@pytest.mark.slow
def test_the_small_worlds_model_is_nearly_what_it_was(run: Run, tmp_path: Path) -> None:
    dst = tmp_path / "b.safetensors"
    code, said = run(quantize, f"src={SMALL_WORLD}", f"dst={dst}", "steps=1", "device=cpu", "budget=33")
    assert code == 0, said
    # no weight is below 36 dB, but what comes out of a GELU has long tails, which end a token's step
    assert detect(dst).metadata.history[-1]["kept"] == [f"blocks.{block}.ffn.2" for block in range(4)]
    found = re.search(r"relative error ([\de.-]+), PSNR ([\d.]+) dB", said)
    # 40 layers whose weights and tokens are off by 1e-2 each, on branches of one stream: 6e-2 of a velocity
    # at most, which guidance of 2.5 takes sqrt(2.5^2 + 1.5^2) times, 3 times; and no less than one layer's
    assert 1e-3 < float(found[1]) < 0.19
    assert float(found[2]) > -20 * torch.tensor(0.19).log10()


@pytest.fixture
def small_world(tmp_path: Path) -> tuple[str, ...]:
    """Words for a step of the small world's network on two prompts."""
    (tmp_path / "two.txt").write_text("an octopus drifts left across a teal background\na cat\n")
    return f"src={SMALL_WORLD}", "steps=1", "device=cpu", f"prompts={tmp_path / 'two.txt'}"


def test_smoothing_changes_nothing_but_what_eight_bits_cost(
    small_world: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    # one layer in 8 bits: the rest shows that the network is what it was
    names = [layer for layer in LAYERS if layer != "self_attn.q"] + ["blocks.1", "blocks.2", "blocks.3"]
    code, said = run(
        quantize, *small_world, "smooth=0.5", f"dst={tmp_path / 'a.safetensors'}", f"keep=[{','.join(names)}]"
    )
    assert code == 0, said
    assert "1 of 40 linear layers" in said
    assert detect(tmp_path / "a.safetensors").metadata.history[-1]["smooth"] == 0.5
    stored, old = load_file(tmp_path / "a.safetensors"), load_file(SMALL_WORLD)
    assert not torch.equal(stored["blocks.3.norm3.weight"], old["blocks.3.norm3.weight"])
    # rows of 256 in 127ths of their largest, twice, 1.2e-2 of one of the branches of the stream
    assert 1e-5 < float(re.search(r"relative error ([\de.-]+)", said)[1]) < 1.2e-2


def test_what_can_not_be_calibrated_is_one_sentence(
    small_world: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    loaded = load_network(SMALL_WORLD, device="cpu", dtype=torch.float32)
    loaded.network.blocks[2].ffn[0].weight.data[3, 3] = torch.nan
    save(src := tmp_path / "nan.safetensors", loaded.network, sampling=loaded.sampling, variant="wan_tiny")
    for file in ("vae_tiny", "text_tiny"):
        (tmp_path / f"{file}.safetensors").symlink_to(SMALL_WORLD.with_name(f"{file}.safetensors"))
    code, said = run(
        quantize, *small_world[1:], f"src={src}", f"dst={tmp_path / 'b.safetensors'}", "gptq=true"
    )
    assert code == 2
    assert "blocks.2.ffn.2 reads NaN or infinities: mend the checkpoint" in said


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int8", "fp8"])
def test_joint_rounding_leaves_less_of_every_layers_error(
    quant: str, small_world: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    outputs = {}
    for gptq in (False, True):
        dst = tmp_path / f"{gptq}.safetensors"
        code, said = run(quantize, *small_world, f"dst={dst}", f"format={quant}", f"gptq={gptq}")
        assert code == 0, said
        found = {layer: re.search(rf" {layer} .*│\s+([\d.]+)\s+[\d.]+ │\s+0 ", said) for layer in LAYERS}
        outputs[gptq] = {layer: float(row[1]) for layer, row in found.items()}
    assert detect(dst).metadata.history[-1]["gptq"]
    assert set(detect(dst).quantised.values()) == {quant}
    # an error's power is half the weights', of which at most a half is left; half a decibel is for the halves
    assert all(
        outputs[True][layer] > outputs[False][layer] + 10 * math.log10(4 / 3) - 0.5 for layer in LAYERS
    )


@pytest.mark.parametrize("scheme", [INT8, FP8, TILES])
@torch.no_grad()
def test_errors_of_outputs_are_those_of_the_layers_own_inputs(scheme: str, network: WanModel) -> None:
    layer, seen = network.blocks[1].self_attn.q, []
    layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    eight = EightBits("blocks.1.self_attn.q", Entry.of(layer.weight), scheme)
    watched, _ = watch_outputs(network, {"blocks.1.self_attn.q": eight})
    powers = watched["blocks.1.self_attn.q"]
    for time in (300.0, 900.0):
        network(torch.randn(1, 16, 2, 4, 4), torch.tensor([time]), torch.randn(1, 3, 4096))
    assert len(seen) == 2
    wanted = torch.zeros(2, dtype=torch.float64)
    for x, y in seen:
        weight = layer.weight.double()
        if scheme == INT8:
            x, weight = (part / 127 * (whole * (127 / part)).round() for part, whole in in_rows(x[0], weight))
        elif scheme == FP8:
            x, weight = (
                part / 448 * (whole * (448 / part)).to(torch.float8_e4m3fn).double()
                for part, whole in in_rows(x[0], weight)
            )
        else:
            step = weight.abs().max() / 128
            weight = (weight / step).round().clamp(max=127) * step
        off = F.linear(x.double(), weight, layer.bias.double()).view_as(y) - y
        wanted += torch.stack([y.double().square().sum(), off.square().sum()])
    # a rounding that falls the other way in fp32 moves one of 128 terms by a step
    torch.testing.assert_close(powers, wanted, rtol=1e-2, atol=0)


@torch.no_grad()
def test_all_that_a_layer_reads_is_seen(network: WanModel) -> None:
    watched, hooks = watch_inputs(network, ["blocks.0.ffn.2"], products=True)
    seen = []
    network.blocks[0].ffn[2].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for time in (300.0, 900.0):
        network(torch.randn(2, 16, 2, 4, 4), torch.tensor([time, time]), torch.randn(2, 3, 4096))
    hooks[0].remove()
    network(100 * torch.randn(1, 16, 2, 4, 4), torch.tensor([time]), torch.randn(1, 3, 4096))
    x = torch.cat(seen[:2]).flatten(0, 1)
    assert torch.equal(watched["blocks.0.ffn.2"].largest, x.abs().amax(0))
    # of 32 products in another order
    torch.testing.assert_close(watched["blocks.0.ffn.2"].products, x.mT @ x, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_layers_that_read_the_same_are_seen_once_and_no_others(network: WanModel) -> None:
    names = [f"blocks.0.{layer}" for layer in sorted(LAYERS)]
    seen: dict[str, torch.Tensor] = {}
    for name in names:
        network.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.update({name: inputs[0]})
        )
    network(torch.randn(1, 16, 2, 4, 4), torch.tensor([300.0]), torch.randn(1, 3, 4096))
    watched, hooks = watch_inputs(network, names)
    for one in names:
        for other in names:
            is_same = seen[one].shape == seen[other].shape and torch.equal(seen[one], seen[other])
            assert (watched[one] is watched[other]) == is_same
    assert len(hooks) == 7


def in_rows(*matrices: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(matrix.double().abs().amax(-1, keepdim=True), matrix.double()) for matrix in matrices]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dst=b.pth"], "format=int8 writes a .safetensors file"),
        (["format=turbodiffusion"], "format=turbodiffusion writes a .pth file"),
        (["format=int4"], "expected one of [int8, fp8, turbodiffusion]"),
        (["dst=a.safetensors"], "a.safetensors exists; pass overwrite=true"),
        (["src=nowhere"], "checkpoint nowhere does not exist"),
        ([f"src={ROOT / 'assets' / 'vae_tiny.safetensors'}"], "holds vae weights; wanted network weights"),
        (["src=int8.safetensors"], "is quantised in this way already"),
        (["budget=200"], "every layer would stay as it is"),
        (["smooth=2"], "smooth=2.0: take 0.5, or any strength up to 1"),
        (["smooth=0.5"], "smooth= and gptq= need to know what layers read: pass prompts=FILE.txt"),
        (["gptq=true", "format=turbodiffusion", "dst=b.pth"], "gptq=true is for format=int8 and format=fp8"),
        (["budget=low"], "budget=low is not understood"),
        (["keep=ffn.1"], "keep=ffn.1 is no layer of this network: name blocks, such as blocks.0, or"),
        (["src=nan.safetensors"], "blocks.1.ffn.2 holds NaN or infinities"),
        (["prompts=nowhere.txt"], "nowhere.txt does not exist"),
        (["prompts=prompts.txt"], "no vae wan2.1: looked for"),
        (["prompts=prompts.txt", "src=i2v.safetensors"], "from text, which wan2.2_i2v_a14b does not"),
    ],
)
def test_what_can_not_be_is_one_sentence_and_writes_nothing(
    words: list[str], said: str, network: WanModel, run: Run, tmp_path: Path
) -> None:
    Path("prompts.txt").write_text("a cat\n")
    assert run(quantize, "src=a.safetensors", "dst=int8.safetensors")[0] == 0
    network.blocks[1].ffn[2].weight.data[3, 3] = torch.nan
    save("nan.safetensors", network, variant="wan2.1_t2v_1.3b")
    i2v = WanModel(dim=128, ffn_dim=64, heads=1, layers=1, in_channels=36)
    save("i2v.safetensors", i2v, variant="wan2.2_i2v_a14b")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, printed = run(quantize, "src=a.safetensors", "dst=b.safetensors", *words)
    assert code == 2
    assert said in printed
    # nothing but the table of layers stands before it
    assert "\n" not in printed.rsplit("\n", 2)[1]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
