"""rCM from end to end on a problem with a known answer: data N(MEAN, SCALE^2) in four dimensions."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from distill.conditioning import Example
from distill.objective import unwatched
from distill.rcm import RCM, Consistency, Matching, Method
from distill.rectified_flow import add_noise
from distill.scm import SCMLoss
from distill.times import LogNormal, RandomRollout, UniformShift
from turbodiffusion.samplers.few_step import sample_rcm
from turbodiffusion.samplers.time import student_times

MEAN, SCALE, SIZE, BATCH = 0.3, 0.5, 4, 128
STEPS, PRETRAINING, WARMUP = 4000, 1500, 400


class Toy(nn.Module):
    """A small network of states and times where WanModel stands; x (B, 4, 1, 1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(SIZE + 2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, SIZE)
        )

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, *, condition: None, clip: None
    ) -> Tensor:
        clock = (timesteps / 1000).float().unsqueeze(1)
        return self.layers(torch.cat((x.flatten(1).float(), clock, torch.sin(3 * clock)), dim=1)).view_as(x)


class Exact(nn.Module):
    """The teacher: E[noise - x0 | x]."""

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, *, condition: None, clip: None
    ) -> Tensor:
        s = (timesteps / 1000).double().view(-1, 1, 1, 1, 1)
        variance = (1 - s) ** 2 * SCALE**2 + s**2
        return (s - (1 - s) * SCALE**2) / variance * (x - (1 - s) * MEAN) - MEAN


def draw(count: int, rng: torch.Generator) -> Example:
    latents = MEAN + SCALE * torch.randn(count, SIZE, 1, 1, 1, generator=rng)
    return Example(latents, torch.zeros(count, 1, 1))


def optimizer(network: nn.Module, rate: float) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), lr=rate, betas=(0.0, 0.999), foreach=True)


def pretrained(rng: torch.Generator) -> Toy:
    """A network that has learnt the teacher's velocity, as every student has."""
    network, teacher, times = Toy(), Exact(), LogNormal(0.0, 1.6)
    adam = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(PRETRAINING):
        example = draw(BATCH, rng)
        s = times(BATCH, rng)
        x = add_noise(example.latents, torch.randn(example.latents.shape, generator=rng), s)
        given = x, 1000 * s, example.context
        error = network(*given, condition=None, clip=None) - teacher(*given, condition=None, clip=None)
        error.square().mean().backward()
        adam.step()
        adam.zero_grad()
    return network


@pytest.mark.slow
def test_training_reaches_the_exact_student_and_its_distribution() -> None:
    rng = torch.Generator().manual_seed(0)
    student = pretrained(rng)
    times = UniformShift(5.0)
    method = Method(
        Consistency(SCMLoss(warmup_steps=WARMUP), LogNormal(0.0, 1.6), weight=1.0),
        Matching(times, RandomRollout(times), weight=0.2),
        guidance=1.0,
    )
    rcm = RCM(method, student, Exact(), deepcopy(student))
    adams = {"student": optimizer(student, 1e-3), "critic": optimizer(rcm.critic, 1e-3)}
    for step in range(STEPS):
        role = rcm.turn(step)
        for _, loss in rcm.losses(draw(BATCH, rng), step, rng, unwatched):
            loss.mean().backward()
        for group in adams["student"].param_groups:
            group["lr"] = 1e-3 * (1 - step / STEPS)
        adams[role].step()
        adams[role].zero_grad()
    example = draw(10000, rng)
    noise = torch.randn(example.latents.shape, generator=rng, dtype=torch.float64)
    one = torch.ones(10000, dtype=torch.float64)
    with torch.no_grad():
        view = rcm.view(student, example)
        error = (noise - view(noise, one) - MEAN - SCALE * noise).square().mean().sqrt()
        made = {
            n: sample_rcm(view, noise, student_times(n, 80.0), lambda: torch.randn_like(noise))
            for n in (1, 4)
        }
    # a single Euler step of the teacher errs by SCALE; the specification's longer training reaches 0.02
    assert error < 0.04
    for x0 in made.values():
        # 2 per cent of the data's, eight standard errors of a deviation
        assert x0.std().item() == pytest.approx(SCALE, abs=0.02 * SCALE)
