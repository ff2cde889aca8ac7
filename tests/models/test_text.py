import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from turbodiffusion.checkpoints.encoder_keys import (
    text_from_published,
    text_from_transformers,
    text_to_published,
)
from turbodiffusion.errors import UserError
from turbodiffusion.models.text import TextEncoder, clean
from turbodiffusion.models.tokenizers import ByteTokenizer

PROMPTS = ["a cat", "", "an octopus drifts left across a teal background", "x" * 150]


def _encoder(layers: int = 2, length: int = 512) -> TextEncoder:
    encoder = TextEncoder(
        tokenizer=ByteTokenizer(),
        length=length,
        vocab=259,
        dim=32,
        ffn_dim=48,
        heads=4,
        head_dim=16,
        layers=layers,
    )
    for weight in encoder.parameters():  # norm weights other than one, biases large enough to matter
        torch.nn.init.normal_(weight, mean=0.5 if weight.ndim == 1 else 0.0, std=0.3)
    return encoder


def _transformers(encoder: TextEncoder) -> UMT5EncoderModel:
    sizes = encoder.config
    model = UMT5EncoderModel(
        UMT5Config(
            vocab_size=sizes["vocab"],
            d_model=sizes["dim"],
            d_ff=sizes["ffn_dim"],
            num_heads=sizes["heads"],
            d_kv=sizes["head_dim"],
            num_layers=sizes["layers"],
        )
    )
    state = encoder.state_dict()
    model.load_state_dict(state | {"shared.weight": state["encoder.embed_tokens.weight"]})
    return model.eval()


def _relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def test_context_is_transformers_at_all_512_positions_with_the_tail_zeroed() -> None:
    encoder = _encoder()
    ids, mask = encoder.tokenize(PROMPTS)
    assert ids.shape[1] == 151  # the longest prompt and EOS: the encoder runs on no more
    ids, mask = (F.pad(x, (0, 512 - 151)) for x in (ids, mask))
    with torch.no_grad():
        wanted = _transformers(encoder)(ids, mask.long()).last_hidden_state * mask[..., None]
    context = encoder(PROMPTS)
    assert context.shape == (4, 512, 32)
    # masked keys weigh exactly zero, so only the order of fp32 sums differs (eps 6e-8, a few hundred terms)
    assert _relative_error(context, wanted) < 1e-5
    assert (context[~mask] == 0).all()


def test_network_is_the_published_one() -> None:
    encoder, ids = _encoder(), torch.randint(3, 259, (1, 200))
    with torch.no_grad():
        context = encoder.encode(ids, torch.ones_like(ids, dtype=torch.bool))[0, :200]
    # fp32 against fp64, as above
    assert _relative_error(context, _published(encoder, ids[0], torch.float64)) < 1e-5


def test_bfloat16_is_as_good_as_the_published_recipe() -> None:
    encoder, ids = _encoder().to(torch.bfloat16), torch.randint(3, 259, (1, 200))
    exact, recipe = (_published(encoder, ids[0], dtype) for dtype in (torch.float64, torch.bfloat16))
    with torch.no_grad():
        context = encoder.encode(ids, torch.ones_like(ids, dtype=torch.bool))[0, :200]
    assert context.dtype == torch.bfloat16
    # the same precision in other kernels: roundings differ, their size does not
    assert _relative_error(context, exact) < 2 * _relative_error(recipe, exact)


def _published(encoder: TextEncoder, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """umT5's formulas, published names: unscaled logits, a bias table per layer, the gate in the GELU.

    Matrix products in `dtype`; norms and softmax in fp32 if that is less.
    """
    w = {name: x.to(dtype) for name, x in text_to_published(encoder.state_dict()).items()}
    x = F.embedding(ids, w["token_embedding.weight"])
    for p in (f"blocks.{n}" for n in range(encoder.config["layers"])):
        x = x + _published_attention(w, p, _rms(x, w[f"{p}.norm1.weight"]))
        h = _rms(x, w[f"{p}.norm2.weight"])
        h = F.gelu(h @ w[f"{p}.ffn.gate.0.weight"].T, approximate="tanh") * (h @ w[f"{p}.ffn.fc1.weight"].T)
        x = x + h @ w[f"{p}.ffn.fc2.weight"].T
    return _rms(x, w["norm.weight"])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    scale = (_wide(x).square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return (_wide(x) * scale).to(weight.dtype) * weight


def _published_attention(w: dict[str, Tensor], p: str, h: Tensor) -> Tensor:
    q, k, v = ((h @ w[f"{p}.attn.{x}.weight"].T).unflatten(-1, (4, 16)).transpose(0, 1) for x in "qkv")
    length = len(h)
    buckets = torch.tensor([[_bucket(key - query) for key in range(length)] for query in range(length)])
    bias = w[f"{p}.pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)  # (N, S, S)
    weights = _wide(q @ k.mT + bias).softmax(-1).to(h.dtype)
    return (weights @ v).transpose(0, 1).flatten(1) @ w[f"{p}.attn.o.weight"].T


def _bucket(offset: int) -> int:
    """Of 32: the upper 16 for later keys; each half has 8 exact distances, then 8 logarithmic up to 128."""
    distance = abs(offset)
    far = 8 + int(math.log(max(distance, 8) / 8) / math.log(128 / 8) * 8)
    return 16 * (offset > 0) + (distance if distance < 8 else min(far, 15))


def test_norm_statistics_are_fp32_whatever_the_dtype() -> None:
    encoder = _encoder().to(torch.bfloat16)
    norm = encoder.encoder.final_layer_norm
    x = torch.full((1, 4096), 300.0, dtype=torch.bfloat16)
    norm.weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    # a bf16 running sum of 4096 equal squares stalls at 256 of them; x / rms(x) is exactly 1
    assert torch.equal(norm(x), torch.ones_like(x))


def test_prompts_of_a_batch_do_not_mix() -> None:
    encoder = _encoder()
    batch = encoder(PROMPTS)
    for prompt, context in zip(PROMPTS, batch, strict=True):
        # other sequence lengths change only the order of fp32 sums
        assert _relative_error(encoder([prompt])[0], context) < 1e-5


def test_empty_prompt_is_its_eos_alone() -> None:
    context = _encoder()([""])
    assert context[0, 0].norm() > 0
    assert (context[0, 1:] == 0).all()


def test_too_long_a_prompt_is_cut_before_eos_and_says_so() -> None:
    encoder = _encoder(length=8)
    with pytest.warns(UserWarning, match=r"11 tokens and 8 fit: its last 3 were dropped"):
        ids, mask = encoder.tokenize(["abcdefghij", "k"])
    assert ids[0].tolist() == [*(byte + 3 for byte in b"abcdefg"), 1]
    assert mask.sum(1).tolist() == [8, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["abcdefg"])


def test_encode_is_differentiable_and_a_call_is_not() -> None:
    encoder = _encoder(length=16)
    assert not encoder(["a cat"]).requires_grad
    encoder.encode(*encoder.tokenize(["a cat", ""])).square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in encoder.parameters())
    assert all(weight.grad.norm() > 0 for weight in encoder.parameters())


def test_wrong_inputs_are_refused() -> None:
    encoder = _encoder(length=8)
    with pytest.raises(UserError, match="wanted a list"):
        encoder("a cat")
    with pytest.raises(UserError, match="wanted a list"):
        encoder([])
    with pytest.raises(UserError, match="9 tokens, at most 8"):
        encoder.encode(torch.ones(1, 9, dtype=torch.long), torch.ones(1, 9, dtype=torch.bool))
    with pytest.raises(UserError, match="259 ids but the encoder 100"):
        TextEncoder(tokenizer=ByteTokenizer(), vocab=100)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  a \t cat\n\nsits  ", "a cat sits"),
        ("rock &amp;amp; roll &lt;3", "rock & roll <3"),
        ("the dog&#39;s\u3000bone", "the dog's bone"),
        ("cafÃ© â€” schÃ¶n", "café — schön"),
        ("Keeps CASE, and punctuation!?", "Keeps CASE, and punctuation!?"),
        ("熊猫 🐙", "熊猫 🐙"),
        (" ", ""),
    ],
)
def test_text_is_cleaned(text: str, wanted: str) -> None:
    assert clean(text) == wanted


def test_weights_assigned_to_a_meta_encoder_are_all_it_needs() -> None:
    encoder = _encoder(length=160)
    with torch.device("meta"):
        loaded = TextEncoder(tokenizer=encoder.tokenizer, **encoder.config)
    loaded.load_state_dict(encoder.state_dict(), assign=True)
    assert torch.equal(loaded(PROMPTS), encoder(PROMPTS))
    assert loaded.to("cpu", torch.bfloat16)(PROMPTS).dtype == torch.bfloat16


PUBLISHED_BLOCK = [
    "norm1",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.o",
    "pos_embedding.embedding",
    "norm2",
    "ffn.gate.0",
    "ffn.fc1",
    "ffn.fc2",
]


def test_umt5_xxl_maps_to_the_published_names_and_back() -> None:
    with torch.device("meta"):
        encoder = TextEncoder(tokenizer=ByteTokenizer())
    ours = encoder.state_dict()
    published = text_to_published(ours)
    names = {f"blocks.{n}.{module}.weight" for n in range(24) for module in PUBLISHED_BLOCK}
    assert published.keys() == names | {"token_embedding.weight", "norm.weight"}
    assert len(published) == 242
    assert sum(x.numel() for x in published.values()) == 5_680_910_336
    back = text_from_published(published)
    assert back.keys() == ours.keys()
    assert all(back[name].shape == x.shape for name, x in ours.items())


def test_published_values_survive_the_round_trip() -> None:
    ours = _encoder().state_dict()
    back = text_from_published(text_to_published(ours))
    assert all(torch.equal(back[name], x) for name, x in ours.items())


@pytest.mark.parametrize("dropped", ["shared.weight", "encoder.embed_tokens.weight", None])
def test_either_name_of_transformers_embedding_loads(dropped: str | None) -> None:
    encoder = _encoder()
    state = _transformers(encoder).state_dict()
    assert {"shared.weight", "encoder.embed_tokens.weight"} <= state.keys()
    state.pop(dropped, None)
    ours = text_from_transformers(state)
    assert all(torch.equal(ours[name], x) for name, x in encoder.state_dict().items())
    assert ours.keys() == encoder.state_dict().keys()


@pytest.mark.parametrize(
    "name", ["blocks.0.norm3.weight", "xnorm.weight", "blocks.a.norm1.weight", "head.weight"]
)
def test_unknown_tensors_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        text_from_published({name: torch.zeros(1)})
    with pytest.raises(UserError, match=name):
        text_to_published({name: torch.zeros(1)})
