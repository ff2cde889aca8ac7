"""What a distillation shows and ships: the student at a few steps, beside its teacher and measured by it.

Shapes: B clips, C latent channels, T h w latent frames, height, width; F H W frames, height, width in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from distill.conditioning import Example, Material
from distill.objective import Product
from distill.precision import halved
from distill.rcm import RCM
from turbodiffusion.checkpoints import LoadedNetwork
from turbodiffusion.models.wan import WanModel
from turbodiffusion.samplers.few_step import sample_rcm
from turbodiffusion.samplers.noise import SampleNoise
from turbodiffusion.samplers.ode import as_state, predict_x0, sample_unipc
from turbodiffusion.samplers.time import rf_to_sigma, shifted_times, student_times

STEPS = (1, 2, 4)
Answer = Callable[[Tensor, Tensor], Tensor]  # (state, time s) -> x0


@dataclass(frozen=True)
class Students:
    """Judged by the mean squared error of latents to an ideal student with the same noise.

    The ideal student answers each of its steps by the teacher's path from there to the end, in teacher_steps
    (None: as many as the teacher asks for); at one step it makes what the teacher makes.  The yardstick is
    the teacher itself at as few steps as the student.
    """

    objective: RCM
    material: Material
    teacher: LoadedNetwork
    file: str
    sigma_max: float  # where the student's chain starts
    teacher_steps: int | None = None

    @torch.no_grad()
    def measure(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        """ "mse/student_N" and "mse/teacher_N" at N steps; nothing without clips to show."""
        if not self.material.shown:
            return {}
        made = self._student(networks["student"])
        errors = {f"mse/student_{n}": _mse(made[n], self._ideal[n]) for n in STEPS}
        return errors | {f"mse/teacher_{n}": _mse(self._hasty[n], self._ideal[1]) for n in STEPS}

    def verdict(self, measures: dict[str, float]) -> str | None:
        """One line on those measures; below 1 the student is the worse of the two."""
        if not measures:
            return None
        n, steps = STEPS[-1], self._steps
        ratio = measures[f"mse/teacher_{n}"] / measures[f"mse/student_{n}"]
        return (
            f"the student at {n} steps is {ratio:.2f} times as close to an ideal one as the teacher at {n} "
            f"is to its own {steps}"
        )

    @torch.no_grad()
    def preview(self, networks: dict[str, nn.Module]) -> Tensor | None:
        """Rows: the teacher, then the student at 1, 2 and 4 steps."""
        if not self.material.shown or self.material.vae is None:
            return None
        made = self._student(networks["student"])
        rows = [self._ideal[1], *(made[n] for n in STEPS)]
        return torch.stack([self.material.vae.decode(row.float(), chunk=None) for row in rows])

    def products(self, networks: dict[str, nn.Module]) -> list[Product]:
        sampling = self.teacher.sampling.as_student(self.sigma_max, self.objective.method.timesteps)
        metadata = self.teacher.report.metadata
        history = list(metadata.history) if metadata else []
        stored = halved(networks["student"], WanModel.is_fp32)
        return [Product(self.file, stored, self.teacher.variant.name, sampling, history)]

    @property
    def _steps(self) -> int:
        return self.teacher_steps or self.teacher.sampling.steps

    def _student(self, network: nn.Module) -> dict[int, Tensor]:
        def answer(example: Example) -> Answer:
            return partial(predict_x0, self.objective.view(network, example))

        return self._chains(answer)

    @cached_property
    def _ideal(self) -> dict[int, Tensor]:
        """Of the ideal student; it never changes."""

        def answer(example: Example) -> Answer:
            return partial(self._follow, example, self._steps)

        return self._chains(answer)

    @cached_property
    def _hasty(self) -> dict[int, Tensor]:
        """The teacher's at few steps."""
        start = student_times(1, self.sigma_max)[0]
        made = {}
        for n in STEPS:
            parts = [
                self._follow(e, n, start * as_state(_noise(e).draw()), start) for e in self.material.shown
            ]
            made[n] = torch.cat(parts)
        return made

    def _follow(self, example: Example, steps: int, x: Tensor, s: Tensor) -> Tensor:
        """x0 at the end of the teacher's path from state x at time s."""
        times = shifted_times(steps, self.teacher.sampling.shift, sigma_max=rf_to_sigma(s).item())
        return sample_unipc(self.objective.guided(example), x, times)

    def _chains(self, answer_for: Callable[[Example], Answer]) -> dict[int, Tensor]:
        """Latents (B, C, T, h, w) of a student that answers so, by its number of steps.

        A short chain is the beginning of a longer one, with the same noise: the longest holds them all.
        """
        chains = [self._chain(answer_for(example), _noise(example)) for example in self.material.shown]
        return {n: torch.cat([chain[n - 1] for chain in chains]) for n in STEPS}

    def _chain(self, answer: Answer, noise: SampleNoise) -> list[Tensor]:
        answers = []

        def velocity(x: Tensor, s: Tensor) -> Tensor:
            answers.append(answer(x, s))
            return (x - answers[-1]) / s.item()

        sample_rcm(velocity, noise.draw(), student_times(STEPS[-1], self.sigma_max), noise.draw)
        return answers


def _noise(example: Example) -> SampleNoise:
    """The noise of an example's clips; always the same."""
    latents = example.latents
    return SampleNoise(range(len(latents)), latents.shape[1:], device=latents.device)


def _mse(made: Tensor, wanted: Tensor) -> float:
    return (made - wanted).square().mean().item()
