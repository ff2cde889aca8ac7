"""The Wan transformer against diffusers' with random weights, and what else it promises."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from turbodiffusion.checkpoints.keys import network_to_diffusers
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel

# diffusers splits text from image tokens at 512, whatever the configuration
SIZES = {
    "dim": 48,
    "ffn_dim": 80,
    "heads": 2,
    "layers": 2,
    "text_dim": 20,
    "text_length": 512,
    "freq_dim": 32,
}
TASKS = {
    "t2v": {},
    "i2v_clip": {"in_channels": 36, "clip_tokens": 257},
    "flf2v_clip": {"in_channels": 36, "clip_tokens": 514},
    "i2v_2.2": {"in_channels": 36},
    "ti2v": {"in_channels": 48, "out_channels": 48},
}


def random_model(task: str) -> WanModel:
    model = WanModel(**SIZES, **TASKS[task])
    with torch.no_grad():
        for parameter in model.parameters():
            # every bias, norm and modulation away from its neutral initial value, and the head from zero
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def diffusers_twin(model: WanModel) -> WanTransformer3DModel:
    config, clip = model.config, model.config["clip_tokens"]
    twin = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config["heads"],
        attention_head_dim=config["dim"] // config["heads"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        text_dim=config["text_dim"],
        freq_dim=config["freq_dim"],
        ffn_dim=config["ffn_dim"],
        num_layers=config["layers"],
        image_dim=1280 if clip else None,
        added_kv_proj_dim=config["dim"] if clip else None,
        pos_embed_seq_len=514 if clip == 514 else None,
    )
    state = {network_to_diffusers(name): tensor for name, tensor in model.state_dict().items()}
    twin.load_state_dict(state, strict=True)
    return twin.eval()


def inputs(model: WanModel) -> dict[str, Tensor]:
    config = model.config
    return {
        "x": torch.randn(2, config["out_channels"], 3, 6, 4),
        "context": torch.randn(2, config["text_length"], config["text_dim"]),
        "condition": torch.randn(2, 20, 3, 6, 4) if config["in_channels"] == 36 else None,
        "clip": torch.randn(2, config["clip_tokens"], 1280) if config["clip_tokens"] else None,
    }


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_velocity_equals_diffusers(task: str) -> None:
    model = random_model(task)
    data, times = inputs(model), torch.tensor([987.0, 251.0])
    twin_x = data["x"] if data["condition"] is None else torch.cat((data["x"], data["condition"]), 1)
    # diffusers takes the two images of a first-and-last-frame model as two rows of the batch
    images = None if data["clip"] is None else data["clip"].reshape(-1, 257, 1280)
    wanted = diffusers_twin(model)(
        twin_x, times, data["context"], encoder_hidden_states_image=images, return_dict=False
    )[0]
    got = model(data["x"], times, data["context"], condition=data["condition"], clip=data["clip"])
    # fp32 rounding through two blocks; the demand is 1e-5
    assert relative_error(got, wanted) < 1e-5


@torch.no_grad()
def test_per_token_time_equals_diffusers() -> None:
    model = random_model("ti2v")
    data, times = inputs(model), torch.rand(2, 18) * 1000
    times[:, :6] = 0  # the tokens of a clean first frame
    wanted = diffusers_twin(model)(data["x"], times, data["context"], return_dict=False)[0]
    assert relative_error(model(data["x"], times, data["context"]), wanted) < 1e-5  # fp32 rounding


@torch.no_grad()
def test_equal_times_per_token_equal_one_time() -> None:
    model = random_model("ti2v")
    data, times = inputs(model), torch.tensor([700.0, 30.0])
    one = model(data["x"], times, data["context"])
    each = model(data["x"], times[:, None].expand(2, 18), data["context"])
    torch.testing.assert_close(each, one, rtol=1e-5, atol=1e-5)  # fp32, another order of summation


@torch.no_grad()
def test_short_text_is_padded_with_zeros_that_are_attended_to() -> None:
    model = random_model("t2v")
    data, times = inputs(model), torch.tensor([500.0, 500.0])
    short = data["context"][:, :5]
    padded = torch.cat((short, torch.zeros(2, 507, 20)), 1)
    torch.testing.assert_close(
        model(data["x"], times, short), model(data["x"], times, padded), rtol=0, atol=0
    )


@pytest.mark.parametrize("task", ["t2v", "flf2v_clip"])
@pytest.mark.parametrize("memorise", [False, True])
@torch.no_grad()
def test_prepared_conditions_serve_every_step_to_the_bit(task: str, memorise: bool) -> None:
    model = random_model(task)
    data = inputs(model)
    prepared = model.prepare(data["x"], data["context"][:, :5], data["clip"], memorise=memorise)
    for time in (987.0, 251.0):
        times, x = torch.tensor([time, 500.0]), torch.randn_like(data["x"])
        wanted = model(x, times, data["context"][:, :5], condition=data["condition"], clip=data["clip"])
        assert torch.equal(model(x, times, prepared, condition=data["condition"]), wanted)


@torch.no_grad()
def test_prepared_keys_and_values_are_not_computed_again() -> None:
    model = random_model("flf2v_clip")
    data = inputs(model)
    prepared = model.prepare(data["x"], data["context"], data["clip"])
    for part in (model.text_embedding, model.img_emb, *(b.cross_attn.k for b in model.blocks)):
        part.register_forward_pre_hook(lambda *_: pytest.fail("what was prepared is computed again"))
    model(data["x"], torch.zeros(2), prepared, condition=data["condition"])


@torch.no_grad()
def test_bf16_stays_near_fp32_and_returns_fp32() -> None:
    model = random_model("i2v_clip")
    data, times = inputs(model), torch.tensor([987.0, 251.0])
    call = {"condition": data["condition"], "clip": data["clip"]}
    wanted = model(data["x"], times, data["context"], **call)
    for name, parameter in model.named_parameters():
        if not WanModel.is_fp32(name):
            parameter.data = parameter.data.bfloat16()
    got = model(data["x"], times, data["context"], **call)
    assert got.dtype == torch.float32
    # bf16 keeps 8 bits: 0.4 % a rounding, some ten roundings deep
    assert relative_error(got, wanted) < 3e-2


def test_untrained_model_predicts_zero_and_gradients_reach_every_parameter() -> None:
    model = WanModel(**SIZES, **TASKS["i2v_clip"])
    data, times = inputs(model), torch.tensor([987.0, 251.0])
    assert model(**data, timesteps=times).abs().max() == 0
    model = random_model("i2v_clip")
    model(**data, timesteps=times).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.randn(2, 15, 3, 6, 4)}, "got 35 input channels"),
        ({"x": torch.randn(2, 16, 3, 5, 4), "condition": torch.randn(2, 20, 3, 5, 4)}, "must be even"),
        ({"context": torch.randn(2, 513, 20)}, "at most 512 fit"),
        ({"clip": None}, "got 0 CLIP image tokens, wanted 257"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Tensor], sentence: str) -> None:
    model = random_model("i2v_clip")
    with pytest.raises(UserError, match=sentence):
        model(**(inputs(model) | change), timesteps=torch.zeros(2))
