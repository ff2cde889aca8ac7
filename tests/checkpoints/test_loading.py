import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from turbodiffusion.checkpoints import LoadedNetwork, load_network, load_vae, save
from turbodiffusion.checkpoints.loading import fill
from turbodiffusion.checkpoints.sources import Entry
from turbodiffusion.errors import UserError
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.models.wan import WanModel
from turbodiffusion.variants import variants

MakeNetwork = Callable[[str], tuple[WanModel, str]]


def load(path: Path, variant: str | None = None, dtype: torch.dtype = torch.float32) -> LoadedNetwork:
    return load_network(path, device="cpu", dtype=dtype, variant=variant)


def sentence(path: Path, variant: str | None = None) -> str:
    with pytest.raises(UserError) as refused:
        load(path, variant)
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def is_same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def turbodiffusion_state(network: WanModel) -> dict[str, Tensor]:
    state = network.state_dict()
    state["patch_embedding.weight"] = state["patch_embedding.weight"].flatten(1)
    return state


def add_sla(state: dict[str, Tensor]) -> dict[str, Tensor]:
    place = "self_attn.attn_op.local_attn.proj_l"
    for block in range(2):
        state |= {
            f"blocks.{block}.{place}.weight": torch.randn(128, 128),
            f"blocks.{block}.{place}.bias": torch.randn(128),
        }
    return state


@pytest.mark.parametrize("task", ["t2v", "i2v_clip", "flf2v", "i2v", "ti2v"])
def test_a_published_safetensors_file_loads_to_the_bit(
    task: str, make_network: MakeNetwork, tmp_path: Path
) -> None:
    network, variant = make_network(task)
    save_file(network.state_dict(), path := tmp_path / "model.safetensors")
    loaded = load(path, variant)
    assert is_same(loaded.network, network)
    assert loaded.network.config == network.config == loaded.variant.network
    assert (loaded.report.format, loaded.sampling) == ("wan", variants()[variant].sampling)


@pytest.mark.parametrize("container", ["flat", "state_dict", "net."])
def test_an_rcm_file_loads_to_the_bit(container: str, make_network: MakeNetwork, tmp_path: Path) -> None:
    network, variant = make_network("i2v")
    state = turbodiffusion_state(network)
    if container == "net.":
        state = {f"net.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": state} if container == "state_dict" else state, path := tmp_path / "model.pth")
    loaded = load(path, variant)
    assert is_same(loaded.network, network)
    assert loaded.report.format == "rcm"


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_the_average_of_a_dcp_directory_loads_to_the_bit(make_network: MakeNetwork, tmp_path: Path) -> None:
    (average, variant), (weights, _) = make_network("t2v"), make_network("t2v")
    groups = {"net_ema.": average, "net.": weights, "net_fake_score.": weights}
    state = {
        p + name: x for p, network in groups.items() for name, x in turbodiffusion_state(network).items()
    }
    dcp.save(state, checkpoint_id=tmp_path / "model", no_dist=True)
    loaded = load(tmp_path, variant)
    assert is_same(loaded.network, average)
    assert loaded.report.format == "dcp"
    again = load_network(tmp_path, device="cpu", dtype=torch.float32, variant=variant, ema=False)
    assert is_same(again.network, weights)


def test_a_quantised_file_loads_as_floats(make_network: MakeNetwork, tmp_path: Path) -> None:
    network, variant = make_network("t2v")
    state, wanted = turbodiffusion_state(network), network.state_dict()
    for name in [
        name
        for name in state
        if name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name
    ]:
        layer, weight = name.removesuffix(".weight"), state.pop(name)
        scale = torch.rand([-(-size // 128) for size in weight.shape])
        integers = torch.randint(-128, 128, weight.shape, dtype=torch.int8)
        state |= {f"{layer}.int8_weight": integers, f"{layer}.scale": scale}
        full = scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)[:, : weight.shape[1]]
        wanted[name] = integers * full
    torch.save(state, path := tmp_path / "model-quant.pth")
    loaded = load(path, variant)
    assert loaded.report.quantised
    assert loaded.report.format == "turbodiffusion"
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.network.state_dict().items())


def test_norms_and_modulation_stay_fp32(make_network: MakeNetwork, tmp_path: Path) -> None:
    network, variant = make_network("i2v_clip")
    save_file(network.state_dict(), path := tmp_path / "model.safetensors")
    loaded = load(path, variant, torch.bfloat16).network
    fp32 = {name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32}
    assert fp32 == {name for name in network.state_dict() if WanModel.is_fp32(name)}
    assert {tensor.dtype for name, tensor in loaded.state_dict().items() if name not in fp32} == {
        torch.bfloat16
    }
    assert {"blocks.1.norm3.bias", "blocks.0.modulation", "blocks.0.cross_attn.norm_k_img.weight"} <= fp32


def test_loaded_weights_outlive_their_file(make_network: MakeNetwork, tmp_path: Path) -> None:
    network, variant = make_network("t2v")
    save_file(network.state_dict(), path := tmp_path / "model.safetensors")
    loaded = load(path, variant).network
    path.write_bytes(bytes(path.stat().st_size))
    assert is_same(loaded, network)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_at_most_one_tensor_is_read_ahead_of_the_module() -> None:
    alive, most = set(), []

    def read(number: int) -> Tensor:
        most.append(len(alive))
        tensor = torch.full((4, 4), float(number))
        alive.add(number)
        weakref.finalize(tensor, alive.discard, number)
        return tensor

    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(20)))
    entries = {f"{i}.weight": Entry((4, 4), torch.float32, lambda i=i: read(i)) for i in range(20)}
    fill(module, entries, Path("x"), lambda name: ("cpu", torch.bfloat16))
    # what was read before is gone when the next is asked for: only the module's own copy remains
    assert most == [0] * 20
    assert [int(layer.weight[0, 0]) for layer in module] == list(range(20))


def test_a_mismatch_names_missing_unexpected_and_misfitting_tensors(
    make_network: MakeNetwork, tmp_path: Path
) -> None:
    network, variant = make_network("t2v")
    state = network.state_dict()
    del state["blocks.1.self_attn.q.weight"], state["head.modulation"]
    state |= {f"extra.{i:02d}": torch.zeros(1) for i in range(12)}
    state["blocks.0.ffn.2.weight"] = torch.zeros(3, 5)
    state["blocks.0.ffn.0.weight"] = torch.zeros(64, 128, dtype=torch.int8)
    save_file(state, path := tmp_path / "model.safetensors")
    said = sentence(path, variant)
    assert "2 missing: blocks.1.self_attn.q.weight, head.modulation" in said
    assert "12 unexpected: extra.00" in said
    assert "extra.09" in said
    assert "extra.10" not in said
    assert "blocks.0.ffn.2.weight (3, 5) torch.float32 (wanted (128, 64))" in said
    assert "blocks.0.ffn.0.weight (64, 128) torch.int8" in said


def test_an_sla_checkpoint_loads_as_it_was_trained(make_network: MakeNetwork, tmp_path: Path) -> None:
    network, variant = make_network("t2v")
    state = add_sla(turbodiffusion_state(network))
    torch.save(state, path := tmp_path / "model.pth")
    loaded = load(path, variant)
    # what the published training says and no file does
    trained = {"name": "sla", "ratio": 0.1, "block_q": 64, "block_k": 64, "feature_map": "softmax"}
    assert loaded.network.config == network.config | {"attention": trained}
    assert loaded.report.format == "turbodiffusion"
    for i, block in enumerate(loaded.network.blocks):
        place = f"blocks.{i}.self_attn.attn_op.local_attn.proj_l"
        assert torch.equal(block.self_attn.core.proj_l.weight, state[f"{place}.weight"])
        assert torch.equal(block.self_attn.core.proj_l.bias, state[f"{place}.bias"])
    assert {tensor.dtype for n, tensor in load(path, variant, torch.bfloat16).network.state_dict().items()
            if "proj_l" in n} == {torch.bfloat16}  # fmt: skip


@pytest.mark.parametrize("lost", ["blocks.1.self_attn.attn_op.local_attn.proj_l.bias", "a whole block's"])
def test_an_sla_checkpoint_has_every_projection_or_none(
    lost: str, make_network: MakeNetwork, tmp_path: Path
) -> None:
    network, variant = make_network("t2v")
    whole = add_sla(turbodiffusion_state(network))
    gone = {lost} if lost in whole else {name for name in whole if "proj_l" in name and "blocks.0" in name}
    torch.save({n: x for n, x in whole.items() if n not in gone}, path := tmp_path / "model.pth")
    assert f"{len(gone)} missing: blocks." in sentence(path, variant)


def test_attention_travels_with_our_files_and_older_ones_are_dense(
    make_network: MakeNetwork, tmp_path: Path
) -> None:
    network, variant = make_network("t2v")
    save(older := tmp_path / "older.safetensors", network, variant=variant)
    with safe_open(older, "pt") as file:
        header = json.loads(file.metadata()["turbodiffusion"])
    del header["config"]["attention"]
    save_file(network.state_dict(), older, {"turbodiffusion": json.dumps(header)})
    assert load(older).network.config == network.config
    assert network.config["attention"] == {"name": "dense"}

    network.set_attention({"name": "sla", "ratio": 0.15, "block_q": 128, "feature_map": "elu"})
    for block in network.blocks:
        nn.init.normal_(block.self_attn.core.proj_l.weight)
    save(path := tmp_path / "sla.safetensors", network, variant=variant)
    loaded = load(path)
    assert is_same(loaded.network, network)
    assert loaded.network.config == network.config
    assert loaded.network.blocks[1].self_attn.core.config == network.blocks[1].self_attn.core.config
    assert loaded.variant.name == variant
    # how it was run is not what it is
    network.set_attention({"name": "sla_int8"})
    save(path, network, variant=variant)
    assert load(path).network.config == loaded.network.config


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vace_blocks.0.before_proj.weight", "VACE"),
        ("blocks.0.self_attn.q.lora_A.weight", "LoRA"),
        ("fc.weight", "no Wan"),
    ],
)
def test_what_is_not_supported_is_named(
    name: str, said: str, make_network: MakeNetwork, tmp_path: Path
) -> None:
    state = {name: torch.ones(1)} | (make_network("t2v")[0].state_dict() if said == "VACE" else {})
    save_file(state, path := tmp_path / "model.safetensors")
    assert said in sentence(path)


def test_the_wrong_kind_is_refused_by_name(make_network: MakeNetwork, tmp_path: Path) -> None:
    vae = VideoVAE(base=4, latent_channels=4, res_blocks=1, latent_mean=[0.0] * 4, latent_std=[1.0] * 4)
    save(tmp_path / "vae.safetensors", vae)
    save(tmp_path / "network.safetensors", make_network("t2v")[0])
    assert "holds vae weights; wanted network weights" in sentence(tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match="holds network weights; wanted vae weights"):
        load_vae(tmp_path / "network.safetensors", device="cpu", dtype=torch.float32)


def test_a_variant_that_is_not_the_files_is_refused(make_network: MakeNetwork, tmp_path: Path) -> None:
    save(path := tmp_path / "model.safetensors", make_network("t2v")[0])
    assert "in_channels 16 (wanted 36)" in sentence(path, "wan2.2_i2v_a14b")
    assert "choose one of" in sentence(path, "wan3")
    assert "pass variant=" in sentence(path)


@pytest.mark.parametrize("guilty", ["config", "sampling", "version", "kind", "json"])
def test_metadata_that_does_not_fit_is_refused(
    guilty: str, make_network: MakeNetwork, tmp_path: Path
) -> None:
    header = {
        "config": '{"version":1,"kind":"network","config":{"width":3},"variant":"wan2.1_t2v_1.3b"}',
        "sampling": '{"version":1,"kind":"network","config":{},"sampling":{"pace":3}}',
        "version": '{"version":2,"kind":"network"}',
        "kind": '{"version":1,"kind":"critic","config":{}}',
        "json": "{",
    }
    state = make_network("t2v")[0].state_dict()
    save_file(state, path := tmp_path / "model.safetensors", metadata={"turbodiffusion": header[guilty]})
    assert str(path) in sentence(path)


def test_our_files_need_nothing_else(make_network: MakeNetwork, tmp_path: Path) -> None:
    network, variant = make_network("i2v_clip")
    sampling = replace(variants()[variant].sampling, steps=7, negative_prompt="慢")
    save(
        path := tmp_path / "model.safetensors",
        network,
        sampling=sampling,
        variant=variant,
        history=[{"steps": 3}],
    )
    loaded = load(path)
    assert is_same(loaded.network, network)
    assert loaded.network.config == network.config
    assert (loaded.variant.name, loaded.sampling) == (variant, sampling)
    assert loaded.report.metadata.history == ({"steps": 3},)
    assert loaded.report.format == "ours"
