from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distill.data import EncodedClips, LatentClips, RenderedClips, Shuffle, Window, encode_clips
from distill.flow_matching import TextToVelocity
from turbodiffusion.errors import UserError
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.small_world.captions import PHRASINGS, caption
from turbodiffusion.small_world.sprites import Sprites, load_sprites

SMALL = Window(frames=5, size=32)


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    return load_sprites()


@pytest.fixture
def vae() -> VideoVAE:
    return VideoVAE(base=4, latent_channels=4, res_blocks=1, latent_mean=[0] * 4, latent_std=[1] * 4)


def test_every_sample_comes_once_an_epoch_in_another_order():
    stream = Shuffle(10, seed=3).indices(0, 30).view(3, 10)
    assert torch.equal(stream.sort(dim=1).values, torch.arange(10).expand(3, 10))
    assert not torch.equal(stream[0], stream[1])


def test_stream_can_be_entered_anywhere():
    whole = Shuffle(10, seed=3).indices(0, 40)
    for start in (0, 7, 10, 23):
        # 13 samples from here: within an epoch, at its border, across one or two of them
        assert torch.equal(Shuffle(10, seed=3).indices(start, 13), whole[start : start + 13])


def test_seed_decides_the_order():
    assert not torch.equal(Shuffle(10, seed=3).indices(0, 10), Shuffle(10, seed=4).indices(0, 10))


def test_captions_belong_to_their_clips_and_vary(
    make_student: Callable[..., TextToVelocity], make_clips: Callable[..., LatentClips]
):
    text_encoder = make_student().text_encoder
    clips = make_clips(text_encoder, clips=10, count=10)
    phrasings = set()
    for number in range(4):
        batch = clips.batch(number)
        for latents, tokens in zip(batch.latents, batch.tokens, strict=True):
            (index,) = (clips.encoded.latents == latents).flatten(1).all(1).nonzero().flatten().tolist()
            subject, motion, background = clips.encoded.triples[index].tolist()
            text = text_encoder.tokenizer.decode(tokens.tolist())
            allowed = [caption(f"animal {subject}", motion, background, i) for i in range(PHRASINGS)]
            phrasings.add(allowed.index(text))
    assert len(phrasings) > PHRASINGS // 2


def test_rendered_batches_repeat_by_number_and_differ_by_split(sprites: Sprites):
    train, held_out = (
        RenderedClips(sprites, 2, SMALL, seed=0, split=split) for split in ("train", "held_out_combinations")
    )
    assert train.batch(3).shape == (2, 3, 5, 32, 32)
    assert torch.equal(train.batch(3), train.batch(3))
    assert not torch.equal(train.batch(3), train.batch(4))
    assert not torch.equal(train.batch(3), held_out.batch(3))


def test_image_latents_know_the_first_frame_only(sprites: Sprites, vae: VideoVAE):
    source = RenderedClips(sprites, 2, SMALL, seed=0)
    encoded, frames = encode_clips(2, source, vae), source.batch(0)
    frames[:, :, 1:] = 0
    assert torch.equal(encoded.image, vae.encode(frames, chunk=None).bfloat16())
    # causal: the first latent frame of the clip is that of its first frame
    assert torch.equal(encoded.image[:, :, 0], encoded.latents[:, :, 0])


def test_cached_clips_are_read_back_and_renewed_with_the_vae(
    tmp_path: Path, vae: VideoVAE, make_student: Callable[..., TextToVelocity]
):
    text_encoder, file = make_student().text_encoder, tmp_path / "clips.safetensors"
    clips = EncodedClips(SMALL, count=2, seed=0, clips=2, held_out=1, cache=str(file))
    first, _ = clips.load(vae, text_encoder)
    written = file.stat().st_mtime_ns
    second, _ = clips.load(vae, text_encoder)
    assert file.stat().st_mtime_ns == written
    assert torch.equal(first.batch(0).latents, second.batch(0).latents)
    with torch.no_grad():
        vae.conv1.weight.mul_(2)
    third, _ = clips.load(vae, text_encoder)
    assert file.stat().st_mtime_ns != written
    assert not torch.equal(first.batch(0).latents, third.batch(0).latents)


@pytest.mark.parametrize("counts", [{"clips": 0}, {"held_out": 0}])
def test_no_clips_are_refused(counts: dict[str, int]) -> None:
    with pytest.raises(UserError, match="at least one"):
        EncodedClips(SMALL, count=1, seed=0, **counts)
