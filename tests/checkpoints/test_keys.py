import pytest
import torch
from diffusers import WanTransformer3DModel

from turbodiffusion.checkpoints import keys
from turbodiffusion.checkpoints.sources import Entry
from turbodiffusion.models.wan import WanModel
from turbodiffusion.variants import variants

# tensors and parameters of the published networks, and tensors once SLA and then INT8 are added
PUBLISHED = {
    "wan2.1_t2v_1.3b": (825, 1_418_996_800),
    "wan2.1_t2v_14b": (1095, 14_288_491_584),
    "wan2.1_i2v_14b_480p": (1303, 16_394_878_784),
    "wan2.1_i2v_14b_720p": (1303, 16_394_878_784),
    "wan2.1_flf2v_14b": (1304, 16_395_536_704),
    "wan2.2_t2v_a14b": (1095, 14_288_491_584),
    "wan2.2_i2v_a14b": (1095, 14_288_901_184),
    "wan2.2_ti2v_5b": (825, 4_999_787_712),
}
TURBO = {"wan2.1_t2v_1.3b": (885, 1185), "wan2.1_t2v_14b": (1175, 1575), "wan2.2_i2v_a14b": (1175, 1575)}


def on_meta(variant: str) -> WanModel:
    with torch.device("meta"):
        return WanModel(**variants()[variant].network)


def entries(model: torch.nn.Module) -> dict[str, Entry]:
    return {name: Entry.of(tensor) for name, tensor in model.state_dict().items()}


def turbo_files(variant: str) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """Names as TurboDiffusion releases a variant tuned for SLA, unquantised and quantised."""
    plain, quantised = {}, {}
    for name, entry in keys.to_turbodiffusion(entries(on_meta(variant))).items():
        plain[name] = quantised[name] = entry
        layer, _, leaf = name.rpartition(".")
        is_linear = leaf == "weight" and "norm" not in layer and name.startswith("blocks.")
        if is_linear:
            del quantised[name]
            rows, columns = (-(-size // 128) for size in entry.shape)
            quantised[f"{layer}.int8_weight"] = Entry(entry.shape, torch.int8, entry.load)
            quantised[f"{layer}.scale"] = Entry((rows, columns), torch.float32, entry.load)
    for block in range(variants()[variant].network["layers"]):
        for leaf, shape in (("weight", (128, 128)), ("bias", (128,))):
            sla = {
                f"blocks.{block}.self_attn.attn_op.local_attn.proj_l.{leaf}": Entry(
                    shape, torch.bfloat16, list
                )
            }
            plain |= sla
            quantised |= sla
    return plain, quantised


@pytest.mark.parametrize("variant", PUBLISHED)
def test_networks_have_the_published_number_of_tensors_and_parameters(variant: str) -> None:
    state = on_meta(variant).state_dict()
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == PUBLISHED[variant]


@pytest.mark.parametrize("variant", TURBO)
def test_turbodiffusion_files_have_the_published_number_of_tensors(variant: str) -> None:
    plain, quantised = turbo_files(variant)
    assert (len(plain), len(quantised)) == TURBO[variant]


@pytest.mark.parametrize("variant", TURBO)
def test_turbodiffusion_names_become_ours_and_back(variant: str) -> None:
    plain, _ = turbo_files(variant)
    ours = keys.from_turbodiffusion(plain)
    core = {name for name in ours if ".self_attn.core.proj_l." in name}
    network = entries(on_meta(variant))
    assert len(core) == 2 * variants()[variant].network["layers"]
    assert {name: e.shape for name, e in ours.items() if name not in core} == {
        n: e.shape for n, e in network.items()
    }
    assert {n: e.shape for n, e in keys.to_turbodiffusion(ours).items()} == {
        n: e.shape for n, e in plain.items()
    }


@pytest.mark.parametrize("variant", sorted(PUBLISHED))
def test_names_and_shapes_are_diffusers(variant: str) -> None:
    network = on_meta(variant)
    sizes = network.config
    clip = sizes["clip_tokens"]
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            num_attention_heads=sizes["heads"],
            attention_head_dim=sizes["dim"] // sizes["heads"],
            in_channels=sizes["in_channels"],
            out_channels=sizes["out_channels"],
            ffn_dim=sizes["ffn_dim"],
            num_layers=sizes["layers"],
            image_dim=1280 if clip else None,
            added_kv_proj_dim=sizes["dim"] if clip else None,
            pos_embed_seq_len=514 if clip == 514 else None,
        ).state_dict()
    ours = network.state_dict()
    mapped = {keys.network_to_diffusers(name): tensor.shape for name, tensor in ours.items()}
    assert mapped == {name: tensor.shape for name, tensor in theirs.items()}
    assert [keys.network_from_diffusers(name) for name in mapped] == list(ours)


@pytest.mark.parametrize(
    "place", ["attn1.attn_op.local_attn.proj_l", "attn1.local_attn.proj_l", "attn1.attn_impl.proj_l"]
)
def test_converters_names_of_sla_are_understood(place: str) -> None:
    assert keys.network_from_diffusers(f"blocks.12.{place}.bias") == "blocks.12.self_attn.core.proj_l.bias"


def test_a_rule_never_rewrites_part_of_a_name() -> None:
    for name in ("blocks.0.ffn.net.0.projector.weight", "extra.proj_out.weight", "blocks.norm2.weight"):
        assert keys.network_from_diffusers(name) == name


def test_wrappers_are_stripped_and_the_average_preferred() -> None:
    stored = {
        "net.blocks.0._checkpoint_wrapped_module.norm3.net.weight": 1,
        "net_ema.blocks.0.norm3.net.weight": 2,
        "net_fake_score.blocks.0.norm3.net.weight": 3,
    }
    for ema, value in ((True, 2), (False, 1)):
        kept, notes = keys.strip_prefixes(stored, ema=ema)
        # an inner `net.` is part of the name
        assert kept == {"blocks.0.norm3.net.weight": value}
        assert "net_fake_score" in notes[0]
    assert keys.strip_prefixes({"head.head.bias": 4}, ema=True) == ({"head.head.bias": 4}, [])
