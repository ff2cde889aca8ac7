"""Tuning for sparse-linear attention: a sparse student learns what its dense teacher says (arXiv:2509.24006).

Shapes: B samples, C latent channels, T h w latent frames, height, width, S text tokens, E width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Generator, Tensor, nn

from distill.conditioning import Example
from distill.objective import OneNetwork, Watch
from distill.rectified_flow import add_noise
from distill.students import BesideTeacher, mse, noise_of
from distill.times import Times
from turbodiffusion.errors import UserError
from turbodiffusion.samplers.denoiser import Denoiser

# of the ramp; blocks are compiled anew for every ratio, and after eight times PyTorch gives up
STAIRS = 5


@dataclass(frozen=True)
class Alignment:
    """How a student is aligned.

    Within ramp_steps its ratio falls from 1 to its own, by the same factor with each stair.  A share
    empty_share of steps trains the negative prompt, which the loss else never sees.  guidance is that of the
    clips that are shown; timesteps says how every network is told the time.
    """

    times: Times
    empty_share: float = 0.0
    ramp_steps: int = 0
    guidance: float = 5.0
    timesteps: str = "float"

    has_critic = False

    def __post_init__(self):
        if not 0 <= self.empty_share <= 1:
            raise UserError(f"empty_share={self.empty_share} is no share: take 0 to 1")

    def ratio(self, step: int, end: float) -> float:
        """The share of blocks kept at a step."""
        stair = step * STAIRS // self.ramp_steps if step < self.ramp_steps else STAIRS
        return end ** (stair / STAIRS)

    def is_empty(self, step: int) -> bool:
        """Whether a step trains the negative prompt; such steps are spread evenly."""
        return int((step + 1) * self.empty_share) > int(step * self.empty_share)

    def build(
        self, student: nn.Module, teacher: nn.Module, critic: None, negative: Tensor | None
    ) -> "SLAFinetune":
        """The objective."""
        if student.config["attention"]["name"] == "dense":
            raise UserError("attention=dense: there is nothing to align; take attention=sla")
        if self.empty_share and negative is None:
            raise UserError(f"empty_share={self.empty_share} needs negative=, the embedding that it trains")
        return SLAFinetune(self, student, teacher, negative)


@dataclass(frozen=True)
class SLAFinetune(OneNetwork):
    """Trains "student", a WanModel with sparse-linear attention, towards the frozen teacher it began as.

    negative (1, S, E): what guidance leads away from.
    """

    method: Alignment
    student: nn.Module
    teacher: nn.Module
    negative: Tensor | None = None

    role = "student"

    def losses(self, batch: Example, step: int, rng: Generator, watch: Watch) -> Iterator[tuple[str, Tensor]]:
        """Mean squared difference of the velocities; raises UserError for prompts without clips."""
        if not batch.has_clips:
            raise UserError("these data hold prompts alone, and alignment starts from clips: give clips")
        if self.method.is_empty(step):
            batch = replace(batch, context=self.negative)
        noise = batch.noise(rng)
        s = self.method.times(len(noise), rng)
        x = add_noise(batch.latents, noise, s)
        with torch.no_grad():
            target = batch.view(self.teacher, self.method.timesteps)(x, s)
        # until the loss is differentiated: a backward may compute the student's blocks again
        with self._keeping(self.method.ratio(step, self._end)):
            difference = batch.view(self.student, self.method.timesteps)(x, s) - target
            loss = difference.square().flatten(1).mean(1)
            watch("sla/velocity", loss, s)
            yield "velocity", loss

    def guided(self, network: nn.Module, batch: Example) -> Denoiser:
        """A network's velocity, with guidance."""
        view = batch.view(network, self.method.timesteps)
        return replace(view, negative=self.negative, guidance=self.method.guidance)

    @property
    def _end(self) -> float:
        return self.student.config["attention"]["ratio"]

    @contextmanager
    def _keeping(self, ratio: float) -> Iterator[None]:
        """The student keeps another share of blocks."""
        options = [block.self_attn.core.config for block in self.student.blocks]
        for each in options:
            each["ratio"] = ratio
        try:
            yield
        finally:
            for each in options:
                each["ratio"] = self._end


@dataclass(frozen=True)
class Twins(BesideTeacher):
    """Shows and ships the student: sampled as its teacher is, from the same noise, it should make the same.

    The yardstick is the student before training: the teacher's weights under the student's attention.
    """

    objective: SLAFinetune

    def scores(self, student: nn.Module) -> dict[str, float]:
        """mse/student and mse/untrained, to the teacher's latents."""
        made = {"student": self._clips(student), "untrained": self._untrained}
        return {f"mse/{who}": mse(clips, self._teacher) for who, clips in made.items()}

    def sentence(self, measures: dict[str, float]) -> str:
        """On those scores."""
        return (
            "mean squared distance to the teacher's clips from the same noise: "
            f"{measures['mse/student']:.4f}, and {measures['mse/untrained']:.4f} before training"
        )

    def rows(self, student: nn.Module) -> list[Tensor]:
        """The teacher, the student untrained, the student; all from the same noise."""
        return [self._teacher, self._untrained, self._clips(student)]

    @cached_property
    def _teacher(self) -> Tensor:
        return self._clips(self.objective.teacher)

    @cached_property
    def _untrained(self) -> Tensor:
        teacher = self.objective.teacher
        own = teacher.config["attention"]
        teacher.set_attention(self.objective.student.config["attention"])
        try:
            return self._clips(teacher)
        finally:
            teacher.set_attention(own, drop_linear=True)

    def _clips(self, network: nn.Module) -> Tensor:
        """Latents of everything that is shown."""
        made = [
            self.by_many_steps(self.objective.guided(network, example), noise_of(example), self.steps)
            for example in self.material.shown
        ]
        return torch.cat(made)
