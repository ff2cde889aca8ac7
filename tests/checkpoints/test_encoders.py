"""VAE and encoder files as others write them.  Oracle: diffusers and transformers with random weights."""

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from tests.models.published import published_image_encoder
from turbodiffusion.checkpoints import (
    load_image_encoder,
    load_network,
    load_text_encoder,
    load_vae,
    save,
)
from turbodiffusion.checkpoints.detect import open_checkpoint
from turbodiffusion.checkpoints.encoder_keys import text_to_published
from turbodiffusion.errors import UserError
from turbodiffusion.models.clip import ImageEncoder
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.tokenizers import ByteTokenizer
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.variants import CONFIGS

TO = {"device": "cpu", "dtype": torch.float32}
TINY_VAES = {
    "2.1": {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1},
    "2.2": {
        **{"base_dim": 8, "decoder_base_dim": 16, "z_dim": 4, "is_residual": True, "patch_size": 2},
        **{"in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16},
    },
}
TEXT = {"vocab": 259, "dim": 16, "ffn_dim": 24, "heads": 2, "head_dim": 8, "layers": 2}
IMAGE = {"dim": 160, "ffn_dim": 48, "heads": 2, "layers": 3, "patch": 4, "size": 16}


def is_same(one: torch.nn.Module, state: dict[str, torch.Tensor]) -> bool:
    mine = one.state_dict()
    return mine.keys() == state.keys() and all(torch.equal(mine[name], state[name]) for name in mine)


@pytest.mark.parametrize("kind", TINY_VAES)
def test_a_diffusers_vae_folder_loads_and_encodes_the_same(kind: str, tmp_path: Path) -> None:
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 3.0]}
    theirs = AutoencoderKLWan(**TINY_VAES[kind], **statistics)
    theirs.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    ours = load_vae(tmp_path, **TO)
    frames = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    mean, std = (torch.tensor(statistics[name]).view(1, 4, 1, 1, 1) for name in statistics)
    with torch.no_grad():
        wanted = (theirs.encode(frames).latent_dist.mean - mean) / std
        # the same convolutions in fp32, in another order
        torch.testing.assert_close(ours.encode(frames), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "count"), [("wan2.1", 194), ("wan2.2", 196)])
def test_a_published_vae_is_known_by_its_widths(name: str, count: int, tmp_path: Path) -> None:
    config = yaml.safe_load((CONFIGS / "vae" / f"{name}.yaml").read_text())
    del config["_target_"]
    with torch.device("meta"):
        vae = VideoVAE(**config)
    shapes = {key: tensor.shape for key, tensor in vae.state_dict().items()}
    assert len(shapes) == count
    # one number stands for each tensor's all, so the file is small
    torch.save(
        {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}, path := tmp_path / "x.pth"
    )
    checkpoint = open_checkpoint(path, kind="vae")
    assert (checkpoint.report.kind, checkpoint.report.format) == ("vae", "wan")
    assert checkpoint.report.config == config
    assert {key: entry.shape for key, entry in checkpoint.entries.items()} == shapes


def test_a_vae_without_statistics_is_refused(tmp_path: Path) -> None:
    vae = VideoVAE(base=4, latent_channels=4, res_blocks=1, latent_mean=[0.0] * 4, latent_std=[1.0] * 4)
    save_file(vae.state_dict(), path := tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="base width 4 with 4 latent channels"):
        load_vae(path, **TO)


def test_our_vae_loads_to_the_bit_with_its_statistics(tmp_path: Path) -> None:
    vae = VideoVAE(
        base=4, latent_channels=4, res_blocks=1, latent_mean=[0.5, 0, 0, 0], latent_std=[1, 2, 3, 4]
    )
    save(path := tmp_path / "x.safetensors", vae)
    loaded = load_vae(path, **TO)
    assert is_same(loaded, vae.state_dict())
    assert loaded.config == vae.config
    # not in the state dict, so the meta build must make them real
    assert loaded.latent_mean.flatten().tolist() == [0.5, 0, 0, 0]


@pytest.mark.parametrize("kind", ["ours", "published", "transformers"])
def test_a_text_encoder_loads_from_every_format(kind: str, tmp_path: Path) -> None:
    sizes = UMT5Config(
        vocab_size=259, d_model=16, d_ff=24, num_heads=2, d_kv=8, num_layers=2, dropout_rate=0.0
    )
    theirs = UMT5EncoderModel(sizes).eval()
    ours = TextEncoder(tokenizer=ByteTokenizer(), length=96 if kind == "ours" else 512, **TEXT)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "shared.weight"})
    if kind == "ours":
        save(path := tmp_path / "x.safetensors", ours)
    elif kind == "published":
        torch.save(text_to_published(ours.state_dict()), path := tmp_path / "x.pth")
    else:
        path = tmp_path / "text_encoder"
        theirs.save_pretrained(path)
    loaded = load_text_encoder(path, **TO)
    assert is_same(loaded, ours.state_dict())
    assert loaded.config == ours.config
    # runs, so nothing was left on the meta device
    assert torch.equal(loaded(["a duck"]), ours(["a duck"]))


def test_a_large_vocabulary_needs_a_tokenizer_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    encoder = TextEncoder(tokenizer=ByteTokenizer(), **(TEXT | {"vocab": 300}))
    save(path := tmp_path / "x.safetensors", encoder)
    with pytest.raises(UserError, match="no tokenizer umt5_xxl: looked for google/umt5-xxl"):
        load_text_encoder(path, **TO)


@pytest.mark.parametrize("kind", ["ours", "published", "transformers"])
def test_an_image_encoder_loads_from_every_format(kind: str, tmp_path: Path) -> None:
    ours = ImageEncoder(**IMAGE)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    if kind == "ours":
        save(path := tmp_path / "x.safetensors", ours)
    elif kind == "published":
        state = published_image_encoder(ours.state_dict()) | {"textual.token_embedding.weight": torch.ones(2)}
        torch.save(state, path := tmp_path / "x.pth")
    else:
        theirs = CLIPVisionModel(
            CLIPVisionConfig(
                **{"hidden_size": 160, "intermediate_size": 48, "num_attention_heads": 2},
                **{"num_hidden_layers": 3, "patch_size": 4, "image_size": 16, "hidden_act": "gelu"},
            )
        )
        missing = theirs.load_state_dict(
            {
                f"vision_model.{k}" if "vision_model" in next(iter(theirs.state_dict())) else k: v
                for k, v in ours.state_dict().items()
            },
            strict=False,
        ).missing_keys
        assert all("post_layernorm" in name for name in missing)
        theirs.save_pretrained(path := tmp_path / "image_encoder")
    loaded = load_image_encoder(path, **TO)
    assert is_same(loaded, ours.state_dict())
    assert loaded.config == ours.config
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded(images), ours(images))


def test_encoders_are_told_apart(tmp_path: Path) -> None:
    save(path := tmp_path / "x.safetensors", TextEncoder(tokenizer=ByteTokenizer(), **TEXT))
    for loader, wanted in ((load_image_encoder, "image encoder"), (load_network, "network")):
        with pytest.raises(UserError, match=f"holds text encoder weights; wanted {wanted} weights"):
            loader(path, **TO)
