"""CLIP and DINO beside transformers', the tokenizer beside ids of OpenAI's."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from evaluation.backbones.clip import load_image_tower, load_text_tower, load_tokenizer, tokens
from evaluation.backbones.vit import load_dino
from evaluation.backbones.weights import find_weights
from turbodiffusion.errors import UserError

CPU = torch.device("cpu")
ROUNDING = 1e-5  # of fp32, through two layers of values about one, on both sides
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "num_hidden_layers": 2}


def shuffled(model: nn.Module) -> nn.Module:
    """Norms and biases must differ from what they start with."""
    for x in model.parameters():
        x.data += 0.05 * torch.randn_like(x)
    return model.eval()


def renamed(state: dict[str, Tensor], names: dict[str, str], joined: str) -> dict[str, Tensor]:
    """Parts of names replaced; the projections of an attention in one tensor, called `joined`."""
    found = {}
    for name, x in state.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        parts = [state[name.replace("q_proj", f"{each}_proj")] for each in "qkv"] if "q_proj" in name else [x]
        name = name.replace("q_proj.", joined)
        for old, new in names.items():
            name = name.replace(old, new)
        found[name] = torch.cat(parts) if len(parts) > 1 else x
    return found


OPENAI = {
    **{"vision_model.": "visual.", "text_model.": "", "encoder.layers": "transformer.resblocks"},
    **{"final_layer_norm": "ln_final", "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
    **{"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "embeddings.patch_embedding": "conv1"},
    **{"embeddings.position_embedding.weight": "positional_embedding", "embeddings.": ""},
    **{"self_attn.": "attn."},
}
TIMM = {
    **{"layernorm_before": "norm1", "layernorm_after": "norm2", "layernorm.": "norm.", "layers.": "blocks."},
    **{"attention.": "attn.", "o_proj": "proj", "embeddings.cls": "cls"},
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.position_embeddings": "pos_embed",
}


@pytest.fixture
def clip(tmp_path: Path) -> tuple[CLIPModel, Path]:
    """transformers' network, and the same as a TorchScript archive of OpenAI's, in fp16 as theirs are."""
    text = {**SIZES, "vocab_size": 99, "max_position_embeddings": 8, "eos_token_id": 98, "bos_token_id": 97}
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    model = shuffled(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)))
    model = model.half().float()
    state = renamed(model.state_dict(), OPENAI, "in_proj_")
    state["visual.proj"] = state.pop("visual_projection.weight").T
    state["text_projection"] = state.pop("text_projection.weight").T
    holder = nn.Module()
    for name, x in state.items():
        *above, last = name.split(".")
        place = holder
        for each in above:
            if not hasattr(place, each):
                place.add_module(each, nn.Module())
            place = getattr(place, each)
        place.register_parameter(last, nn.Parameter(x.half()))
    for name in ("input_resolution", "context_length", "vocab_size"):
        holder.register_buffer(name, torch.tensor(8))
    torch.jit.script(holder).save(tmp_path / "clip.pt")
    return model, tmp_path / "clip.pt"


@torch.no_grad()
def test_clip_is_transformers(clip: tuple[CLIPModel, Path]) -> None:
    model, path = clip
    images = torch.randn(3, 3, 32, 32)
    image_tower, text_tower = load_image_tower(path, CPU), load_text_tower(path, CPU)
    wanted = model.visual_projection(model.vision_model(images).pooler_output)
    torch.testing.assert_close(image_tower(images), wanted, atol=ROUNDING, rtol=0)
    ids = torch.tensor([[97, 5, 6, 7, 98]])
    wanted = model.text_projection(model.text_model(ids).pooler_output)
    torch.testing.assert_close(text_tower(ids), wanted, atol=ROUNDING, rtol=0)
    with pytest.raises(UserError, match="has a text of 9 tokens, and CLIP reads 8: 'long'"):
        tokens("long", lambda text: [97, *[5] * 7, 98], text_tower, may_cut=False)
    cut = tokens("long", lambda text: [97, *[5] * 7, 98], text_tower, may_cut=True)
    assert cut.tolist() == [[97, *[5] * 6, 98]]


@pytest.mark.gpu
@torch.no_grad()
def test_clip_is_fp16_on_a_gpu_but_for_its_norms(clip: tuple[CLIPModel, Path]) -> None:
    tower = load_image_tower(clip[1], torch.device("cuda"))
    dtypes = {name: x.dtype for name, x in tower.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        x for x in dtypes if "ln_" in x
    }
    images = torch.randn(3, 3, 32, 32)
    # fp16's 11 bits, through two layers of values about one
    wanted = load_image_tower(clip[1], CPU)(images)
    torch.testing.assert_close(tower(images.cuda()).cpu().float(), wanted, atol=1e-2, rtol=0)


@torch.no_grad()
def test_dino_is_transformers_at_the_size_it_was_trained_at(tmp_path: Path) -> None:
    config = ViTConfig(**SIZES, image_size=64, patch_size=16, layer_norm_eps=1e-6)
    model = shuffled(ViTModel(config, add_pooling_layer=False))
    torch.save(renamed(model.state_dict(), TIMM, "qkv."), tmp_path / "dino.pth")
    network = load_dino(tmp_path / "dino.pth", CPU)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network(images), model(images)[0][:, 0], atol=ROUNDING, rtol=0)
    # what is left over at the right and below is not looked at
    more = torch.nn.functional.pad(images, (0, 9, 0, 5), value=7.0)
    assert torch.equal(network(more), network(images))
    grid = network.pos_embed[0, 1:].view(4, 4, -1).double().numpy()
    wanted = torch.from_numpy(np.einsum("ai,bj,ijc->abc", cubic(3, 4), cubic(7, 4), grid))
    places = network._places(3, 7)[0].unflatten(0, (3, 7)).double()
    # sums of 16 fp32 numbers below one
    torch.testing.assert_close(places, wanted, atol=1e-6, rtol=0)


def cubic(count: int, trained: int) -> np.ndarray:
    """Weights (count, trained) of cubic convolution, a = -0.75, where the published code samples.

    That is as if there were 0.1 of a patch more; edges are repeated.
    """
    at = (np.arange(count) + 0.5) * trained / (count + 0.1) - 0.5
    weights = np.zeros((count, trained))
    for row, place in enumerate(at):
        for near in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            d = abs(place - near)
            weight = 1.25 * d**3 - 2.25 * d**2 + 1 if d <= 1 else -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[row, np.clip(near, 0, trained - 1)] += weight
    return weights


def test_text_becomes_pieces(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "merges.txt.gz", "wt") as file:
        file.write("#version\nc a\nca t</w>\n")
    encode = load_tokenizer(tmp_path / "merges.txt.gz")
    # bytes from "!" on, then those that end a word, then merges, start and end
    letter = {each: ord(each) - ord("!") for each in "abcst"}
    assert encode("A  Cat") == [514, 256 + letter["a"], 513, 515]
    assert encode("cats&amp;amp;c") == [
        *(514, 512, letter["t"], 256 + letter["s"]),
        *(256 + ord("&") - ord("!"), 256 + letter["c"], 515),
    ]


# found by OpenAI's own tokenizer, of openai-clip 1.0.1
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("Caf&eacute; at   NIGHT, 日本", [15304, 536, 930, 267, 39121, 19277, 361]),
    ],
)
def test_pieces_are_openais(text: str, ids: list[int]) -> None:
    try:
        path = find_weights({"this test": ["vocabulary"]})["vocabulary"]
    except UserError as error:
        pytest.skip(str(error))
    assert load_tokenizer(path)(text) == [49406, *ids, 49407]
