import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.models.published import published_image_encoder
from turbodiffusion.checkpoints.encoder_keys import image_from_published, image_from_transformers
from turbodiffusion.errors import UserError
from turbodiffusion.models.clip import ImageEncoder

SIZES = {"dim": 32, "ffn_dim": 48, "heads": 4, "patch": 4, "size": 16}


def _transformers(layers: int) -> CLIPVisionModel:
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_hidden_layers=layers,
            patch_size=4,
            image_size=16,
            hidden_act="gelu",
        )
    )
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=0.5 if weight.ndim == 1 else 0.0, std=0.2)
    return model.eval()


def _encoder(model: CLIPVisionModel, layers: int) -> ImageEncoder:
    encoder = ImageEncoder(**SIZES, layers=layers)
    encoder.load_state_dict(image_from_transformers(model.state_dict(), layers=layers))
    return encoder


def _standardised(images: Tensor) -> Tensor:
    """[-1, 1] -> CLIP's published mean and standard deviation of [0, 1] pixels."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return ((images + 1) / 2 - mean) / std


def _close(got: Tensor, wanted: Tensor) -> bool:
    # same operations in fp32: a few roundings (eps 6e-8) apart
    return bool((got - wanted).norm() < 1e-5 * wanted.norm())


def test_tokens_are_transformers_before_the_last_layer() -> None:
    model, images = _transformers(layers=3), torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        wanted = model(_standardised(images), output_hidden_states=True).hidden_states[-2]
    tokens = _encoder(model, layers=2)(images)
    assert tokens.shape == (2, 17, 32)
    assert _close(tokens, wanted)


def test_images_are_squeezed_to_the_square_by_plain_bicubic() -> None:
    encoder, images = _encoder(_transformers(layers=2), layers=1), torch.rand(1, 3, 40, 24) * 2 - 1
    square = F.interpolate(images, (16, 16), mode="bicubic", align_corners=False, antialias=False)
    assert _close(encoder(images), encoder(square))


def test_images_of_a_batch_do_not_mix() -> None:
    encoder, images = _encoder(_transformers(layers=2), layers=1), torch.rand(3, 3, 20, 20) * 2 - 1
    tokens = encoder(images)
    assert all(_close(encoder(images[i : i + 1])[0], tokens[i]) for i in range(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_fp32(dtype: torch.dtype) -> None:
    encoder, images = _encoder(_transformers(layers=4), layers=3), torch.rand(2, 3, 20, 20) * 2 - 1
    wanted = encoder(images)
    tokens = encoder.to(dtype)(images.to(dtype))
    assert tokens.dtype == dtype
    # unit roundoff eps / 2, at each of the 7 sums of the residual stream, a random walk; twice: branches too
    bound = torch.finfo(dtype).eps * 7**0.5
    assert (tokens.float() - wanted).norm() < bound * wanted.norm()


def test_weights_assigned_to_a_meta_encoder_are_all_it_needs() -> None:
    encoder, images = _encoder(_transformers(layers=2), layers=1), torch.rand(1, 3, 20, 20)
    with torch.device("meta"):
        loaded = ImageEncoder(**encoder.config)
    loaded.load_state_dict(encoder.state_dict(), assign=True)
    assert torch.equal(loaded(images), encoder(images))
    assert loaded.to("cpu", torch.bfloat16)(images).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "images",
    [torch.zeros(3, 16, 16), torch.zeros(1, 4, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)],
)
def test_wrong_images_are_refused(images: Tensor) -> None:
    with pytest.raises(UserError, match="wanted floats"):
        ImageEncoder(**SIZES, layers=1)(images)


def _published_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The visual side of the published ViT-H/14 file, less what follows the last layer."""
    shapes = {
        "patch_embedding.weight": (1280, 3, 14, 14),
        "cls_embedding": (1, 1, 1280),
        "pos_embedding": (1, 257, 1280),
        "pre_norm.weight": (1280,),
        "pre_norm.bias": (1280,),
    }
    linears = {
        "attn.to_qkv": (3840, 1280),
        "attn.proj": (1280, 1280),
        "mlp.0": (5120, 1280),
        "mlp.2": (1280, 5120),
    }
    for n in range(layers):
        for name in ("norm1", "norm2"):
            shapes |= {f"transformer.{n}.{name}.{kind}": (1280,) for kind in ("weight", "bias")}
        for name, shape in linears.items():
            shapes |= {f"transformer.{n}.{name}.weight": shape, f"transformer.{n}.{name}.bias": shape[:1]}
    return {f"visual.{name}": shape for name, shape in shapes.items()}


def test_vit_h_maps_to_the_published_names_and_back() -> None:
    with torch.device("meta"):
        ours = ImageEncoder().state_dict()
    published = published_image_encoder(ours)
    assert {name: tuple(x.shape) for name, x in published.items()} == _published_shapes(31)
    back = image_from_published(published)
    assert {name: x.shape for name, x in back.items()} == {name: x.shape for name, x in ours.items()}


def test_published_file_loads_without_what_wan_never_reads() -> None:
    state = {name: torch.empty(shape, device="meta") for name, shape in _published_shapes(32).items()}
    unused = [
        "visual.post_norm.weight",
        "visual.post_norm.bias",
        "visual.head",
        "log_scale",
        "textual.model.norm.bias",
    ]
    state |= {name: torch.empty(1, device="meta") for name in unused}
    with torch.device("meta"):
        encoder = ImageEncoder()
    encoder.load_state_dict(image_from_published(state))


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_transformers_file_loads_with_and_without_its_prefix(prefix: str) -> None:
    with torch.device("meta"):
        model = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_attention_heads=16,
                num_hidden_layers=32,
                patch_size=14,
            )
        )
        encoder = ImageEncoder()
    bare = {name.removeprefix("vision_model."): x for name, x in model.state_dict().items()}
    state = {f"{prefix}{name}": x for name, x in bare.items()}
    state |= {f"{prefix}embeddings.position_ids": torch.zeros(1), "visual_projection.weight": torch.zeros(1)}
    encoder.load_state_dict(image_from_transformers(state))


def test_values_survive_the_round_trip_and_fused_rows_are_query_key_value() -> None:
    ours = _encoder(_transformers(layers=2), layers=2).state_dict()
    published = published_image_encoder(ours)
    q, k, v = (ours[f"encoder.layers.1.self_attn.{x}_proj.bias"] for x in "qkv")
    assert torch.equal(published["visual.transformer.1.attn.to_qkv.bias"], torch.cat((q, k, v)))
    back = image_from_published(published)
    assert all(torch.equal(back[name], x) for name, x in ours.items())


@pytest.mark.parametrize(
    "name", ["visual.transformer.0.norm3.weight", "visual.extra", "model.visual.cls_embedding"]
)
def test_unknown_tensors_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        image_from_published({name: torch.zeros(1)})
