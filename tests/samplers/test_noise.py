import pytest
import torch

from turbodiffusion.errors import UserError
from turbodiffusion.samplers.noise import SampleNoise

SHAPE = (16, 3, 5, 7)


def test_a_sample_of_a_batch_is_the_sample_alone():
    batch = SampleNoise([3, 41, 3, 0], SHAPE)
    alone = SampleNoise([41], SHAPE)
    for _ in range(3):
        noise = batch.draw()
        assert noise.shape == (4, *SHAPE)
        assert noise.dtype == torch.float32
        assert torch.equal(noise[1], alone.draw()[0])
        assert torch.equal(noise[0], noise[2])
        assert not torch.equal(noise[0], noise[3])


def test_a_draw_that_began_before_is_the_same():
    plain, ahead = SampleNoise([3, 41], SHAPE), SampleNoise([3, 41], SHAPE)
    for is_begun in (True, False, True, True):
        if is_begun:
            ahead.begin()
        assert torch.equal(ahead.draw(), plain.draw())


def test_every_draw_is_fresh():
    noise = SampleNoise([7], SHAPE)
    assert not torch.equal(noise.draw(), noise.draw())


def test_global_randomness_neither_matters_nor_changes():
    first = SampleNoise([7], SHAPE).draw()
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(SampleNoise([7], SHAPE).draw(), first)
    torch.set_rng_state(state)
    SampleNoise([7], SHAPE).draw()
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_standard_normal():
    noise = SampleNoise(range(8), (100_000,)).draw()
    # five standard errors
    assert noise.mean(dim=1).abs().max() < 5 / 100_000**0.5
    assert (noise.var(dim=1) - 1).abs().max() < 5 * (2 / 100_000) ** 0.5


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_would_repeat_another_is_refused(seed):
    with pytest.raises(UserError, match=str(seed)):
        SampleNoise([0, seed], SHAPE)


@pytest.mark.gpu
def test_the_device_does_not_change_the_noise():
    assert torch.equal(SampleNoise([5], SHAPE, device="cuda").draw().cpu(), SampleNoise([5], SHAPE).draw())
