"""The pipeline in code, against the same steps written out by hand."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from turbodiffusion.errors import UserError
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.tokenizers import ByteTokenizer
from turbodiffusion.pipelines.found import find, load
from turbodiffusion.pipelines.generate import Clip, Models, Pipeline
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.pipelines.watch import Watch
from turbodiffusion.variants import Sampling

CPU = torch.device("cpu")
SIZE = Size(64, 32)
# sums are taken in another order in a batch and in fp64 here; the random VAE makes up to 1.4e-4 (measured) of
# that fp32 rounding, on values of about 1.  A wrong seed, mask or text shows as more than 1e-2.
ROUNDING = 1e-3


@pytest.fixture
def parts(family: Callable) -> Callable[[str], tuple[Models, Sampling]]:
    def make(variant: str, **changed: object) -> tuple[Models, Sampling]:
        found = find(family(variant).options())
        models = load(found, device=CPU, dtype=torch.float32)
        return models, replace(found.sampling, **{"steps": 2, **changed})

    return make


def picture(shade: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(shade)
    return torch.rand(1, 3, SIZE.height, SIZE.width, generator=generator) * 2 - 1


def by_hand(models: Models, sampling: Sampling, prompt: str, seed: int, **known: Tensor) -> Tensor:
    """Two Euler steps with guidance, in fp64, from the definitions."""
    context, negative = models.text_encoder([prompt]), models.text_encoder([sampling.negative_prompt])
    shape = (1, 16, 2, SIZE.height // 8, SIZE.width // 8)
    x = torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed))[None].double()
    shifted = sampling.shift * 0.5 / (1 + (sampling.shift - 1) * 0.5)
    for s, s_next in ((1.0, shifted), (shifted, 0.0)):
        time = torch.tensor([float(int(1000 * s)) if sampling.timesteps == "truncate" else 1000 * s])
        v, v_negative = (
            models.network(x.float(), time, text, **known).double() for text in (context, negative)
        )
        x = x + (s_next - s) * (v_negative + sampling.guidance * (v - v_negative))
    return models.vae.decode(x.float())


@torch.no_grad()
def test_text_to_video_is_encode_guide_integrate_decode(parts: Callable) -> None:
    models, sampling = parts("wan2.1_t2v_1.3b", sampler="euler")
    ours = Pipeline(models, sampling, device=CPU)(Clip(prompts=["a cat"], size=SIZE, frames=5), [7])
    theirs = by_hand(models, sampling, "a cat", 7)
    assert ours.frames.shape == (1, 3, 5, 32, 64)
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours.frames, theirs, atol=ROUNDING, rtol=0)
    assert list(ours.seconds) == ["text", "denoise", "decode"]


@pytest.mark.parametrize("tiled", [False, True])
def test_frames_are_taken_as_they_come(parts: Callable, tiled: bool) -> None:
    models, sampling = parts("wan_tiny")
    pipeline, taken = Pipeline(models, sampling, device=CPU, tiled=tiled), []
    latents = torch.randn(1, 16, 3, 4, 40, generator=torch.Generator().manual_seed(0))
    frames = pipeline.decode(latents, Watch(CPU), taken.append)
    assert torch.equal(torch.cat(taken, dim=2), frames)
    assert frames.shape == (1, 3, 9, 32, 320)


@torch.no_grad()
def test_image_to_video_shows_the_network_mask_then_encoded_picture(parts: Callable) -> None:
    models, sampling = parts("wan_tiny", sampler="euler")
    image = picture()
    clip = Clip(prompts=["a cat"], size=SIZE, frames=5, image=image)
    ours = Pipeline(models, sampling, device=CPU)(clip, [7])
    latents = models.vae.encode(F.pad(image.unsqueeze(2), (0, 0, 0, 0, 0, 4)))
    mask = torch.zeros(1, 4, 2, 4, 8)
    mask[:, :, 0] = 1
    theirs = by_hand(models, sampling, "a cat", 7, condition=torch.cat([mask, latents], dim=1))
    torch.testing.assert_close(ours.frames, theirs, atol=ROUNDING, rtol=0)
    assert list(ours.seconds) == ["text", "image", "denoise", "decode"]


@torch.no_grad()
def test_one_network_for_both_tasks_makes_videos_from_text_with_an_all_zero_condition(
    parts: Callable,
) -> None:
    models, sampling = parts("wan_tiny", sampler="euler")
    ours = Pipeline(models, sampling, device=CPU)(Clip(prompts=["a cat"], size=SIZE, frames=5), [7])
    theirs = by_hand(models, sampling, "a cat", 7, condition=torch.zeros(1, 20, 2, 4, 8))
    torch.testing.assert_close(ours.frames, theirs, atol=ROUNDING, rtol=0)


@torch.no_grad()
def test_clip_models_get_the_tokens_of_each_picture_in_order(parts: Callable) -> None:
    for variant, last in (("wan2.1_i2v_14b_480p", None), ("wan2.1_flf2v_14b", picture(1))):
        models, sampling = parts(variant, sampler="euler")
        first = picture()
        clip = Clip(prompts=["a cat"], size=SIZE, frames=5, image=first, last_image=last)
        ours = Pipeline(models, sampling, device=CPU)(clip, [7])
        video, mask = torch.zeros(1, 3, 5, 32, 64), torch.zeros(1, 4, 2, 4, 8)
        video[:, :, 0], mask[:, :, 0] = first, 1
        tokens = models.image_encoder(first)
        if last is not None:
            video[:, :, 4], mask[:, 3, 1] = last, 1
            tokens = torch.cat([tokens, models.image_encoder(last)], dim=1)
        y = torch.cat([mask, models.vae.encode(video)], dim=1)
        theirs = by_hand(models, sampling, "a cat", 7, condition=y, clip=tokens)
        torch.testing.assert_close(ours.frames, theirs, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("sampler", ["unipc", "euler", "dpmpp", "rcm"])
@torch.no_grad()
def test_ti2v_ends_on_the_encoded_picture_whatever_the_sampler(parts: Callable, sampler: str) -> None:
    models, sampling = parts("wan2.2_ti2v_5b", sampler=sampler, sigma_max=80.0)
    image = picture()
    pipeline = Pipeline(models, sampling, device=CPU)
    clip = Clip(prompts=["a cat"], size=SIZE, frames=5, image=image)
    frames = pipeline(clip, [0]).frames
    known = models.vae.decode(models.vae.encode(image.unsqueeze(2)))
    # the first latent decodes alone (the VAE is causal); the sampler held it in fp64
    torch.testing.assert_close(frames[:, :, :1], known, atol=ROUNDING, rtol=0)
    assert (frames[:, :, 1:] - known).abs().max() > 0.01


@pytest.mark.parametrize("variant", ["wan_tiny", "wan2.2_t2v_a14b"])
def test_a_sample_depends_on_its_prompt_and_seed_alone(parts: Callable, variant: str) -> None:
    models, sampling = parts(variant, sampler="rcm", sigma_max=80.0, steps=3)  # draws noise at every step
    pipeline = Pipeline(models, sampling, device=CPU)
    prompts, seeds = ["a cat", "a dog on a hill", "a cat"], [3, 4, 5]
    together = pipeline(Clip(prompts=prompts, size=SIZE, frames=5), seeds).frames
    for j, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = pipeline(Clip(prompts=[prompt], size=SIZE, frames=5), [seed]).frames
        torch.testing.assert_close(together[j : j + 1], alone, atol=ROUNDING, rtol=0)
    assert (together[0] - together[2]).abs().max() > 0.01  # another seed, another video


def test_one_prompt_serves_many_seeds_but_two_do_not_serve_three(parts: Callable) -> None:
    pipeline = Pipeline(*parts("wan_tiny"), device=CPU)
    assert pipeline(Clip(prompts=["a"], size=SIZE, frames=5), [0, 1, 2]).frames.shape[0] == 3
    with pytest.raises(UserError, match="2 prompts and 3 seeds"):
        pipeline(Clip(prompts=["a", "b"], size=SIZE, frames=5), [0, 1, 2])


def test_both_experts_run_each_on_its_side_of_the_boundary(parts: Callable) -> None:
    models, sampling = parts("wan2.2_t2v_a14b", sampler="euler", steps=4, shift=1.0, boundary=0.6)
    calls: list[tuple[str, float]] = []
    for name in ("network", "network_low"):
        getattr(models, name).register_forward_pre_hook(
            lambda _, args, name=name: calls.append((name, args[1].item()))
        )
    Pipeline(models, sampling, device=CPU)(Clip(prompts=["a"], size=SIZE, frames=5), [0])
    # two forwards a step, one per text; 1000, 750 are at or above 600
    assert [name for name, _ in calls] == ["network"] * 4 + ["network_low"] * 4
    assert [time for _, time in calls[::2]] == [1000, 750, 500, 250]


def test_without_guidance_the_negative_prompt_is_not_even_encoded(parts: Callable) -> None:
    models, sampling = parts("wan_tiny", guidance=1.0)
    texts: list[list[str]] = []
    models.text_encoder.register_forward_pre_hook(lambda _, args: texts.append(args[0]))
    forwards: list[int] = []
    models.network.register_forward_pre_hook(lambda *_: forwards.append(1))
    Pipeline(models, sampling, device=CPU)(Clip(prompts=["a"], size=SIZE, frames=5), [0])
    assert texts == [["a"]]
    assert len(forwards) == 2


@pytest.mark.parametrize("variant", ["wan_tiny", "wan2.2_i2v_a14b", "wan2.1_i2v_14b_480p"])
@pytest.mark.parametrize("mode", ["stage", "block"])
def test_offloading_does_not_change_a_pixel_and_leaves_no_trace(
    parts: Callable, variant: str, mode: str
) -> None:
    models, sampling = parts(variant, steps=3)
    clip = Clip(prompts=["a cat"], size=SIZE, frames=5, image=picture())
    plain = Pipeline(models, sampling, device=CPU)(clip, [0]).frames
    pipeline = Pipeline(models, sampling, device=CPU, offload=mode)
    assert torch.equal(pipeline(clip, [0]).frames, plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in models.network.modules())


@pytest.mark.parametrize(("mode", "away"), [("stage", [[], [], []]), ("block", [[0], [1], [2]])])
@torch.no_grad()
def test_blocks_of_the_text_encoder_are_streamed_too(
    parts: Callable, mode: str, away: list[list[int]]
) -> None:
    models, sampling = parts("wan_tiny")
    encoder = TextEncoder(tokenizer=ByteTokenizer(), **{**models.text_encoder.config, "layers": 3})
    models, units = replace(models, text_encoder=encoder), encoder.shard_units()

    def places() -> list[list[int]]:
        return [[tensor.data_ptr() for tensor in unit.parameters()] for unit in units]

    homes, seen = places(), []
    for unit in units:
        unit.register_forward_hook(lambda *_: seen.append(places()))
    clip, watch = Clip(prompts=["a cat", "a dog"], size=SIZE, frames=5), Watch(CPU)
    plain = Pipeline(models, sampling, device=CPU).encode(clip, watch)
    assert seen == [homes] * 9  # three blocks, for each prompt and the negative one
    seen.clear()
    pipeline = Pipeline(models, sampling, device=CPU, offload=mode)
    streamed = pipeline.encode(clip, watch)
    assert torch.equal(streamed.context, plain.context)
    assert torch.equal(streamed.negative, plain.negative)
    # of each text the block that runs
    assert [[i for i in range(3) if now[i] != homes[i]] for now in seen] == away * 3
    pipeline.residence.release()
    assert places() == homes


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["none", "stage", "block"])
def test_offloading_on_a_gpu_makes_the_cpus_video(
    parts: Callable, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    models, sampling = parts("wan2.2_i2v_a14b", steps=3)
    clip = Clip(prompts=["a cat"], size=SIZE, frames=5, image=picture())
    plain = Pipeline(models, sampling, device=CPU)(clip, [0]).frames
    made = Pipeline(models, sampling, device=torch.device("cuda"), offload=mode)(clip, [0]).frames
    # fp32 on both, sums in another order: 1e-6 a layer, which a decoder of random weights may amplify
    torch.testing.assert_close(made.cpu(), plain, atol=1e-3, rtol=0)


def test_tiles_make_nearly_the_same_video(parts: Callable) -> None:
    models, sampling = parts("wan_tiny")
    clip = Clip(prompts=["a"], size=Size(384, 32), frames=5)
    whole, tiled = (
        Pipeline(models, sampling, device=CPU, tiled=tiled)(clip, [0]).frames for tiled in (False, True)
    )
    assert whole.shape == tiled.shape
    # tiles see no farther than their edge: not equal, but the same picture
    assert 10 * torch.log10(4 / (whole - tiled).square().mean()) > 20


def test_progress_is_told_for_every_stage_up_to_its_total(parts: Callable) -> None:
    told: list[tuple[str, int, int]] = []
    pipeline = Pipeline(*parts("wan_tiny", steps=3), device=CPU)
    pipeline(
        Clip(prompts=["a"], size=SIZE, frames=5, image=picture()), [0], on_progress=lambda *a: told.append(a)
    )
    assert [(n, d, t) for n, d, t in told if n == "denoise"] == [
        ("denoise", i, 3)
        for i in (0, 1, 2, 3, 3)  # the last again when its work is really done
    ]
    assert list(dict.fromkeys(name for name, _, _ in told)) == ["text", "image", "denoise", "decode"]
    assert {name: done for name, done, _ in told} == {name: total for name, _, total in told}


def test_wrong_clips_are_refused(parts: Callable) -> None:
    models, sampling = parts("wan2.1_i2v_14b_480p")
    pipeline = Pipeline(models, sampling, device=CPU)
    with pytest.raises(UserError, match="give it an image"):
        pipeline(Clip(prompts=["a"], size=SIZE, frames=5), [0])
    with pytest.raises(UserError, match="two pictures"):
        pipeline(Clip(prompts=["a"], size=SIZE, frames=5, image=picture(), last_image=picture()), [0])
    with pytest.raises(UserError, match="frames=6"):
        pipeline(Clip(prompts=["a"], size=SIZE, frames=6, image=picture()), [0])
    with pytest.raises(UserError, match="divide by 16"):
        pipeline(Clip(prompts=["a"], size=Size(60, 32), frames=5, image=picture()), [0])


def test_a_foreign_vae_is_refused(parts: Callable) -> None:
    models, sampling = parts("wan_tiny")
    foreign, _ = parts("wan2.2_ti2v_5b")
    with pytest.raises(UserError, match="48 latent channels but the network makes 16"):
        Pipeline(replace(models, vae=foreign.vae), sampling, device=CPU)
