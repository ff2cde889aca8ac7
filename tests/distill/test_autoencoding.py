from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from distill.autoencoding import Autoencoder, AutoencoderOutcome, Autoencoding, psnr
from distill.objective import unwatched
from turbodiffusion.models.vae import VideoVAE


@dataclass(frozen=True)
class Noise:
    """Batches of two random clips of 5 frames."""

    count: int = 2

    def batch(self, number: int) -> Tensor:
        return torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(number)) * 2 - 1


@pytest.fixture
def autoencoder() -> Autoencoder:
    return Autoencoder(
        VideoVAE(base=4, latent_channels=4, res_blocks=1, latent_mean=[0] * 4, latent_std=[1] * 4)
    )


def loss_of(autoencoder: Autoencoder, compute: Callable[..., tuple[Tensor, ...]], **weights: float) -> Tensor:
    autoencoder.forward = compute
    objective = Autoencoding(autoencoder, **weights)
    ((_, loss),) = objective.losses(Noise().batch(0), 0, torch.Generator().manual_seed(0), unwatched)
    return loss


def test_perfect_reconstruction_from_normal_latents_has_zero_loss(autoencoder: Autoencoder):
    def compute(frames: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return frames, torch.zeros_like(noise), torch.zeros_like(noise)

    assert torch.equal(loss_of(autoencoder, compute), torch.zeros(2))


def test_divergence_is_that_of_normal_distributions(autoencoder: Autoencoder):
    mean, logvar = torch.randn(2, 4, 2, 2, 2), torch.randn(2, 4, 2, 2, 2)
    loss = loss_of(autoencoder, lambda frames, noise: (frames, mean, logvar), kl=1.0)
    ours = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = (
        torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).flatten(1).mean(1)
    )
    # sums of 32 fp32 numbers
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_constant_shift_costs_its_square_and_no_sharpness(autoencoder: Autoencoder):
    def compute(frames: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return frames + 0.25, torch.zeros_like(noise), torch.zeros_like(noise)

    # rounding of x + 0.25 in fp32
    torch.testing.assert_close(loss_of(autoencoder, compute), torch.full((2,), 0.25**2), rtol=1e-5, atol=0)


def test_decoder_is_given_mean_plus_std_times_noise(autoencoder: Autoencoder):
    frames, noise = Noise().batch(0), torch.randn(2, 4, 2, 2, 2)
    reconstruction, mean, logvar = autoencoder(frames, noise)
    expected = autoencoder.vae.reconstruct(mean + logvar.exp().sqrt() * noise)
    # sqrt(exp(v)) against exp(v / 2), through a few layers
    torch.testing.assert_close(reconstruction, expected, rtol=1e-4, atol=1e-5)


def test_psnr_of_a_known_error():
    clips = torch.zeros(2, 3, 1, 4, 4)
    # peak 2, error 0.2: 20 log10(10)
    torch.testing.assert_close(psnr(clips + 0.2, clips), torch.full((2,), 20.0))


def test_shipped_vae_makes_latents_of_mean_zero_and_deviation_one(autoencoder: Autoencoder):
    outcome = AutoencoderOutcome(Noise(), Noise(), clips=6, name="vae")
    (product,) = outcome.products({"autoencoder": autoencoder})
    vae = product.module.float()
    latents = torch.cat([vae.encode(Noise().batch(i)) for i in range(3)])
    # the statistics were taken before the weights were rounded to bf16
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(4), rtol=0, atol=0.05)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(4), rtol=0.05, atol=0)
    assert vae.config["latent_mean"] != [0] * 4
