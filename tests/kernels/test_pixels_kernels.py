"""The Triton kernels between convolutions: on a GPU, or in the interpreter by test_without_gpu.py."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from kernels import pixels, reference_pixels
from kernels import pixels_triton as kernels
from kernels.selftest import unfused
from tests.kernels.judging import DEVICE, GPU
from turbodiffusion.models.vae import VideoVAE

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# channels of Wan2.1 and Wan2.2, and of small autoencoders, some of no tile
CHANNELS = [96, 192, 160, 1024, 8, 12]
# two samples and frames, with pixels left over by whole programs of a frame and of a line
SHAPE = (2, 2, 12, 130) if GPU else (2, 2, 3, 66)
# what fp32 loses, of a pixel's largest number: some 20 roundings; a GPU's exponentials take part
LOSS = 20 * 2**-24


def draw(channels: int, dtype: torch.dtype, frames: int = SHAPE[1]) -> Tensor:
    """Channels last in memory, of a mean that is not small, with a loud channel and a silent pixel."""
    B, _, H, W = SHAPE
    x = 1 + torch.randn(B, frames, H, W, channels)
    x[..., 1] *= 50
    x[0, 0, 0, 0] = 0
    return x.to(DEVICE, dtype).movedim(-1, 1)


def draw_rows(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    bias, gamma = torch.randn(2, channels).to(DEVICE, dtype)
    return bias, gamma.view(-1, 1, 1, 1)


def judge(name: str, *inputs: Tensor | None) -> None:
    """Against the twin in fp64: every number is rounded once, beside what fp32 loses."""
    got = getattr(kernels, name)(*inputs)
    truth = getattr(reference_pixels, name)(*(None if x is None else x.double() for x in inputs))
    assert got.dtype == inputs[0].dtype
    assert got.shape == truth.shape
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    room = torch.finfo(got.dtype).eps / 2 * truth.abs() + LOSS * truth.abs().amax(1, keepdim=True)
    if got.dtype == FP16:
        # below 6e-5 it has steps of 2^-24
        room += 2**-25
    assert ((got.double() - truth).abs() <= room).all()


@pytest.mark.parametrize("is_biased", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("channels", CHANNELS)
def test_each_step_is_its_twin(channels: int, dtype: torch.dtype, is_biased: bool) -> None:
    x, y, before = draw(channels, dtype), draw(channels, dtype), draw(channels, dtype, frames=2)
    bias, gamma = draw_rows(channels, dtype)
    bias = bias if is_biased else None
    judge("norm_silu", x, bias, gamma, before)
    judge("add", x, bias, y)
    judge("enlarge", x)


def test_channels_that_are_not_last_are_moved() -> None:
    x, (bias, gamma) = draw(96, FP32).contiguous(), draw_rows(96, FP32)
    judge("norm_silu", x, bias, gamma, x[:, :, :1])
    judge("add", x, bias, x)
    judge("enlarge", x)


def test_a_pixel_that_is_not_finite_stays_alone() -> None:
    x, (bias, gamma) = draw(96, BF16), draw_rows(96, BF16)
    x[1, 5, 1, 2, 65] = torch.nan
    bad = kernels.norm_silu(x, bias, gamma, x[:, :, :1]).isnan()
    # behind the frame that comes before; all channels of the pixel and no other
    assert bad[1, :, 2, 2, 65].all()
    assert bad.sum() == 96


@torch.no_grad()
def test_public_steps_run_the_kernels() -> None:
    x, (bias, gamma) = draw(96, BF16), draw_rows(96, BF16)
    inputs = {"norm_silu": (x, bias, gamma, x[:, :, :1]), "add": (x, bias, x), "enlarge": (x,)}
    for name, args in inputs.items():
        assert torch.equal(getattr(pixels, name)(*args), getattr(kernels, name)(*args)), name
    with unfused():
        assert not pixels.fuses(x)
        for name, args in inputs.items():
            assert torch.equal(getattr(pixels, name)(*args), getattr(reference_pixels, name)(*args)), name


@torch.no_grad()
def test_an_autoencoder_is_the_same_with_and_without_kernels() -> None:
    torch.manual_seed(0)
    sizes = {"base": 32, "latent_channels": 4, "multipliers": (1, 2, 2), "temporal": (True, False)}
    vae = VideoVAE(**sizes, latent_mean=[0.0] * 4, latent_std=[1.0] * 4).to(DEVICE)
    frames = torch.rand(1, 3, 5, 16, 16, device=DEVICE) * 2 - 1
    for parameter in vae.parameters():
        # no bias and no projection of zero hides what is left out
        parameter.data += 0.02 * torch.randn_like(parameter)
    results = []
    for mode in (nullcontext, unfused):
        with mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            latents = vae.encode(frames, chunk=1)
            results.append((latents, vae.decode(latents, chunk=1)))
    for fused, plain in zip(*results, strict=True):
        # fp32 through some thirty layers
        assert (fused - plain).norm() / plain.norm() < 1e-4
