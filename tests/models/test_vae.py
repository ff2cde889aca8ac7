"""The video VAE against diffusers' AutoencoderKLWan, and the properties streaming rests on."""

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from turbodiffusion.checkpoints.vae_keys import vae_to_diffusers
from turbodiffusion.errors import UserError
from turbodiffusion.models.vae import VideoVAE

CONFIGS = Path(__file__).parents[2] / "configs" / "vae"
MEAN, STD = [0.3, -0.2, 0.1, 0.0], [0.5, 2.0, 1.5, 1.0]
# fp32 rounding through some thirty layers of both implementations; seen: 5e-7 encoding, 1.5e-6 decoding
CLOSE = 1e-5


def build(patch: int = 1, res_blocks: int = 2) -> VideoVAE:
    decoder_base = 12 if patch > 1 else 8
    return VideoVAE(
        base=8,
        decoder_base=decoder_base,
        latent_channels=4,
        res_blocks=res_blocks,
        patch=patch,
        latent_mean=MEAN,
        latent_std=STD,
    ).eval()


def randomise(vae: nn.Module) -> None:
    """Break the ones and zeros that weights start from, so that every parameter matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("weight"):
                fan_in = parameter[0].numel()
                parameter.normal_(0, fan_in**-0.5, generator=generator)
            else:
                parameter.normal_(0, 0.1, generator=generator)


def config(name: str) -> dict:
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert values.pop("_target_") == "turbodiffusion.models.vae.VideoVAE"
    return values


def reference(vae: VideoVAE) -> AutoencoderKLWan:
    sizes = vae.config
    nested = {}
    if vae.patch > 1:
        nested = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
        nested["scale_factor_spatial"] = 16
    theirs = AutoencoderKLWan(
        base_dim=sizes["base"],
        decoder_base_dim=sizes["decoder_base"],
        z_dim=sizes["latent_channels"],
        dim_mult=sizes["multipliers"],
        num_res_blocks=sizes["res_blocks"],
        temperal_downsample=sizes["temporal"],
        latents_mean=sizes["latent_mean"],
        latents_std=sizes["latent_std"],
        **nested,
    )
    blocks = sizes["res_blocks"]
    theirs.load_state_dict({vae_to_diffusers(k, res_blocks=blocks): v for k, v in vae.state_dict().items()})
    return theirs.eval()


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def column(values: list[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


@pytest.fixture(scope="module", params=[1, 2], ids=["wan2.1", "wan2.2"])
def pair(request: pytest.FixtureRequest) -> tuple[VideoVAE, AutoencoderKLWan]:
    vae = build(request.param)
    randomise(vae)
    return vae, reference(vae)


@pytest.mark.parametrize("frames", [1, 5, 17, 33])
@torch.no_grad()
def test_encoding_matches_diffusers_for_every_chunk(
    pair: tuple[VideoVAE, AutoencoderKLWan], frames: int
) -> None:
    vae, theirs = pair
    clip = noise(1, 3, frames, 32, 16).clamp(-1, 1)
    wanted = theirs.encode(clip).latent_dist.mean
    wanted = (wanted - column(MEAN)) / column(STD)
    for chunk in (1, 2, 4, None):
        assert relative(vae.encode(clip, chunk=chunk), wanted) < CLOSE


@pytest.mark.parametrize("frames", [1, 5, 17, 33])
@torch.no_grad()
def test_decoding_matches_diffusers_for_every_chunk(
    pair: tuple[VideoVAE, AutoencoderKLWan], frames: int
) -> None:
    vae, theirs = pair
    latents = noise(1, 4, 1 + frames // 4, 2, 1)
    wanted = theirs.decode(latents * column(STD) + column(MEAN)).sample
    assert wanted.shape[2] == frames
    # a clamped picture hides errors: most of it must not be
    assert (wanted.abs() < 1).float().mean() > 0.5
    for chunk in (1, 2, 4, None):
        assert relative(vae.decode(latents, chunk=chunk), wanted) < CLOSE


@torch.no_grad()
def test_short_levels_match_diffusers() -> None:
    vae = build(res_blocks=1)
    randomise(vae)
    theirs = reference(vae)
    clip = noise(2, 3, 5, 16, 16).clamp(-1, 1)
    moments = theirs.encode(clip).latent_dist
    mean, logvar = vae.moments(clip)
    assert relative(mean, moments.mean) < CLOSE
    # diffusers clamps the log-variance to [-30, 20]; these are well inside
    assert relative(logvar, moments.logvar) < CLOSE
    assert relative(vae.reconstruct(mean).clamp(-1, 1), theirs.decode(mean).sample) < CLOSE


@pytest.mark.parametrize(
    ("name", "keys", "parameters", "spatial"),
    [("wan2.1", 194, 126_892_531, 8), ("wan2.2", 196, 704_688_668, 16)],
)
def test_published_sizes_have_the_published_parameters(
    name: str, keys: int, parameters: int, spatial: int
) -> None:
    with torch.device("meta"):
        vae = VideoVAE(**config(name))
        sizes = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
        base = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48}
        theirs = AutoencoderKLWan(**(sizes | base if name == "wan2.2" else {}))
    assert len(vae.state_dict()) == keys
    assert sum(p.numel() for p in vae.parameters()) == parameters
    assert (vae.spatial_factor, vae.temporal_factor) == (spatial, 4)
    ours = {vae_to_diffusers(key): value.shape for key, value in vae.state_dict().items()}
    assert ours == {key: value.shape for key, value in theirs.state_dict().items()}


def test_published_statistics_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        theirs = AutoencoderKLWan()
    assert config("wan2.1")["latent_mean"] == theirs.config.latents_mean
    assert config("wan2.1")["latent_std"] == theirs.config.latents_std


def test_a_name_no_vae_has_is_refused() -> None:
    with pytest.raises(KeyError, match=r"decoder\.conv9"):
        vae_to_diffusers("decoder.conv9.weight")


@torch.no_grad()
def test_a_latent_changes_no_frame_before_its_own() -> None:
    vae = build()
    randomise(vae)
    latents = noise(1, 4, 5, 2, 2)
    changed = latents.clone()
    changed[:, :, 3] += 1
    difference = (vae.decode(changed, chunk=None) - vae.decode(latents, chunk=None)).abs().amax((0, 1, 3, 4))
    # latent 3 stands for frames 9 ... 12; what precedes comes from the same numbers, up to rounding
    assert difference[:9].max() < 1e-6
    assert difference[9] > 1e-3


@torch.no_grad()
def test_a_frame_changes_no_latent_before_its_own() -> None:
    vae = build()
    randomise(vae)
    clip = noise(1, 3, 17, 16, 16)
    changed = clip.clone()
    changed[:, :, 9] += 1
    difference = (vae.encode(changed, chunk=None) - vae.encode(clip, chunk=None)).abs().amax((0, 1, 3, 4))
    assert difference[:3].max() < 1e-6
    assert difference[3] > 1e-3


def test_gradients_reach_every_parameter_in_one_pass() -> None:
    vae = build()
    randomise(vae)
    mean, logvar = vae.moments(noise(2, 3, 9, 16, 16))
    (vae.reconstruct(mean).square().mean() + logvar.square().mean()).backward()
    still = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still


@pytest.mark.parametrize("patch", [1, 2])
def test_streamed_gradients_equal_one_pass(patch: int) -> None:
    vae = build(patch, res_blocks=1)
    randomise(vae)
    gradients = []
    for chunk in (1, None):
        latents = noise(1, 4, 3, 2, 2).requires_grad_()
        vae.decode(latents, chunk=chunk).square().sum().backward()
        gradients.append(latents.grad)
    assert relative(*gradients) < CLOSE


def test_the_one_pass_path_is_a_single_graph() -> None:
    vae = build(res_blocks=1)
    randomise(vae)

    def round_trip(frames: Tensor) -> Tensor:
        return vae.reconstruct(vae.moments(frames)[0])

    frames = noise(1, 3, 5, 16, 16)
    # fullgraph raises at whatever cannot be captured; the backend only replays it
    compiled = torch.compile(round_trip, backend="eager", fullgraph=True)
    assert relative(compiled(frames), round_trip(frames)) < CLOSE


@torch.no_grad()
def test_pieces_are_handed_over_as_they_are_decoded() -> None:
    vae = build()
    pieces: list[Tensor] = []
    frames = vae.decode(noise(1, 4, 4, 1, 1), chunk=3, on_frames=pieces.append)
    assert [piece.shape[2] for piece in pieces] == [9, 4]
    assert torch.equal(torch.cat(pieces, dim=2), frames)


@torch.no_grad()
def test_statistics_stay_fp32_and_correct_when_the_weights_move() -> None:
    vae = build().to(torch.bfloat16)
    assert vae.latent_std.dtype == torch.float32
    assert torch.equal(vae.latent_std.flatten(), torch.tensor(STD))
    with torch.device("meta"):
        empty = build()
    empty = empty.to_empty(device="cpu")
    assert torch.equal(empty.latent_mean.flatten(), torch.tensor(MEAN))
    assert not {"latent_mean", "latent_std"} & empty.state_dict().keys()


@torch.no_grad()
def test_bf16_weights_give_fp32_results_near_those_of_fp32() -> None:
    vae = build()
    randomise(vae)
    clip = noise(1, 3, 5, 16, 16).clamp(-1, 1)
    latents, frames = vae.encode(clip), vae.decode(noise(1, 4, 2, 2, 2))
    vae.to(torch.bfloat16)
    rounded_latents, rounded_frames = vae.encode(clip), vae.decode(noise(1, 4, 2, 2, 2))
    assert rounded_latents.dtype == rounded_frames.dtype == torch.float32
    # bf16 rounds by up to 2^-9 at each of some thirty layers; seen: 1 %
    assert relative(rounded_latents, latents) < 0.03
    assert relative(rounded_frames, frames) < 0.03


@torch.no_grad()
def test_the_norm_survives_bf16_outliers_and_silence() -> None:
    vae = build().to(torch.bfloat16)
    norm = vae.encoder.head["0"]
    x = noise(1, 32, 1, 2, 2).to(torch.bfloat16) * 1e4
    x[..., 0] = 0
    got = norm(x).float()
    wanted = x.float() / x.float().square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
    # one rounding to bf16's eight bits
    torch.testing.assert_close(got, wanted, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 16, 16), r"16 frames.*use 13 or 17"),
        ((1, 3, 3, 16, 16), r"3 frames.*use 1 or 5"),
        ((1, 3, 5, 480, 830), r"830x480.*use 832x480"),
        ((1, 3, 5, 3, 16), r"16x3.*use 16x8"),
        ((1, 4, 5, 16, 16), r"\(1, 4, 5, 16, 16\).*\(B, 3, F, H, W\)"),
    ],
)
def test_frames_it_cannot_encode_are_refused_by_name(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build().encode(torch.zeros(shape))


def test_latents_it_cannot_decode_are_refused() -> None:
    with pytest.raises(UserError, match=r"\(1, 16, 2, 2, 2\).*\(B, 4, T, h, w\)"):
        build().decode(torch.zeros(1, 16, 2, 2, 2))
    with pytest.raises(UserError, match="chunk=0"):
        build().decode(torch.zeros(1, 4, 2, 2, 2), chunk=0)


def test_sizes_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(UserError, match="2 temporal flags for 4 multipliers"):
        VideoVAE(latent_channels=4, temporal=(True, True), latent_mean=MEAN, latent_std=STD)
    with pytest.raises(UserError, match="4 latent means or stds; give one for each of 16"):
        VideoVAE(latent_mean=MEAN, latent_std=STD)
