"""What a distillation shows and ships: the student at a few steps, beside its teacher and measured by it.

Shapes: B clips, C latent channels, T h w latent frames, height, width; F H W frames, height, width in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from distill.conditioning import Example, Material
from distill.objective import Objective, Product
from distill.rcm import RCM
from turbodiffusion.checkpoints import LoadedNetwork
from turbodiffusion.models.wan import WanModel
from turbodiffusion.samplers.denoiser import Denoiser
from turbodiffusion.samplers.few_step import sample_rcm
from turbodiffusion.samplers.noise import SampleNoise
from turbodiffusion.samplers.ode import as_state, sample_unipc
from turbodiffusion.samplers.time import shifted_times, student_times
from turbodiffusion.variants import Sampling

STEPS = (1, 2, 4)
Pair = tuple[Tensor, Tensor]  # latents (B, C, T, h, w) of the same prompts from first and from other noise
Sampler = Callable[[Example, SampleNoise], Tensor]


@dataclass(frozen=True)
class BesideTeacher:
    """Measures and draws the student beside its teacher; where nothing is shown, only ships it."""

    objective: Objective
    material: Material
    teacher: LoadedNetwork
    file: str
    sigma_max: float  # where the samplers start
    teacher_steps: int | None = None  # None: as many as the teacher asks for

    @torch.no_grad()
    def measure(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        return self.scores(networks["student"]) if self.material.shown else {}

    def verdict(self, measures: dict[str, float]) -> str | None:
        return self.sentence(measures) if measures else None

    @torch.no_grad()
    def preview(self, networks: dict[str, nn.Module]) -> Tensor | None:
        vae = self.material.vae
        if not self.material.shown or vae is None:
            return None
        return torch.stack([vae.decode(row.float(), chunk=None) for row in self.rows(networks["student"])])

    def products(self, networks: dict[str, nn.Module]) -> list[Product]:
        made = (self.file, networks["student"], self.teacher.variant.name, self.sampling())
        return [Product(*made, self.teacher.report.history, WanModel.is_fp32)]

    def sampling(self) -> Sampling:
        """The student's."""
        return self.teacher.sampling

    @property
    def steps(self) -> int:
        """The teacher's."""
        return self.teacher_steps or self.teacher.sampling.steps

    def by_many_steps(self, velocity: Denoiser, noise: SampleNoise, steps: int) -> Tensor:
        """Latents, as the teacher's sampler makes them."""
        times = shifted_times(steps, self.teacher.sampling.shift, sigma_max=self.sigma_max)
        return sample_unipc(velocity, times[0].item() * as_state(noise.draw()), times)


@dataclass(frozen=True)
class Students(BesideTeacher):
    """Judged by the energy score (Gneiting and Raftery, 2007) against the teacher's clips of the prompts.

    |made - teacher's| - |made - made again| / 2, in units of a latent value, each term a mean over prompts:
    in expectation it is least for whoever makes the teacher's distribution, and a blurred mean, which the
    squared error prefers, scores worse.  The teacher at teacher_steps (None: as many as it asks for) scores
    the least there is.  The yardsticks are the teacher at as few steps, and an untrained student: the
    teacher's weights in the student's sampler.
    """

    objective: RCM

    def scores(self, student: nn.Module) -> dict[str, float]:
        """energy/WHO_N at N steps, and mse/student_N to the teacher from the same noise."""
        truth, _ = self._teacher[self.steps]
        made = {n: self._student(student, n) for n in STEPS}
        scores = {f"energy/student_{n}": _energy(pair, truth) for n, pair in made.items()}
        scores |= {f"energy/untrained_{n}": _energy(pair, truth) for n, pair in self._untrained.items()}
        scores |= {f"energy/teacher_{n}": _energy(pair, truth) for n, pair in self._teacher.items()}
        return scores | {f"mse/student_{n}": mse(first, truth) for n, (first, _) in made.items()}

    def sentence(self, measures: dict[str, float]) -> str:
        """On those scores."""
        whos = ("student_4", "untrained_4", "teacher_4", f"teacher_{self.steps}")
        student, untrained, hasty, best = (measures[f"energy/{who}"] for who in whos)
        word = "beats" if student < min(untrained, hasty) else "does not beat"
        return (
            f"at 4 steps the student {word} its teacher: energy score {student:.3f}; the teacher's "
            f"{hasty:.3f}, {untrained:.3f} in the student's sampler, and {best:.3f} at {self.steps} steps "
            "(less is better)"
        )

    def rows(self, student: nn.Module) -> list[Tensor]:
        """The teacher, then the student at 1, 2 and 4 steps, all from the same noise."""
        pairs = [self._teacher[self.steps], *(self._student(student, n) for n in STEPS)]
        return [first for first, _ in pairs]

    def sampling(self) -> Sampling:
        return self.teacher.sampling.as_student(self.sigma_max, self.objective.method.timesteps)

    def _student(self, network: nn.Module, steps: int) -> Pair:
        times = student_times(steps, self.sigma_max)

        def sample(example: Example, noise: SampleNoise) -> Tensor:
            return sample_rcm(self.objective.view(network, example), noise.draw(), times, noise.draw)

        return self._pair(sample)

    @cached_property
    def _untrained(self) -> dict[int, Pair]:
        return {n: self._student(self.objective.teacher, n) for n in STEPS}

    @cached_property
    def _teacher(self) -> dict[int, Pair]:
        """By its number of steps; it never changes."""
        return {n: self._pair(self._teacher_sampler(n)) for n in (*STEPS, self.steps)}

    def _teacher_sampler(self, steps: int) -> Sampler:
        return lambda example, noise: self.by_many_steps(self.objective.guided(example), noise, steps)

    def _pair(self, sample: Sampler) -> Pair:
        first, other = (
            torch.cat([sample(example, noise_of(example, offset)) for example in self.material.shown])
            for offset in (0, 1)
        )
        return first, other


def noise_of(example: Example, offset: int = 0) -> SampleNoise:
    """Noise of an example's clips, always the same; another for another offset."""
    latents, count = example.latents, len(example.latents)
    seeds = range(offset * count, (offset + 1) * count)
    return SampleNoise(seeds, latents.shape[1:], device=latents.device)


def _energy(made: Pair, truth: Tensor) -> float:
    """Of the clips from other noise than the truth's, which are independent of it."""
    first, again = made
    return _distance(again, truth) - _distance(again, first) / 2


def _distance(a: Tensor, b: Tensor) -> float:
    """Mean length of the differences, a value of the latents."""
    return ((a - b).double().flatten(1).norm(dim=1).mean() / a[0].numel() ** 0.5).item()


def mse(made: Tensor, wanted: Tensor) -> float:
    """Mean squared difference of a value."""
    return (made - wanted).square().mean().item()
