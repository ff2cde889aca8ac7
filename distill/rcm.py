"""rCM: continuous-time consistency, regularised by distribution matching (arXiv:2510.08431); or either alone.

Shapes: B samples, C latent channels, T h w latent frames, height, width, S text tokens, E width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor, nn

from distill.conditioning import Example
from distill.dcm import DCMLoss
from distill.dmd import CriticLoss, DMDLoss, simulate
from distill.objective import Watch
from distill.rectified_flow import add_noise
from distill.scm import SCMLoss
from distill.times import DiscreteTimes, FixedRollout, RandomRollout, Times
from turbodiffusion.errors import UserError
from turbodiffusion.samplers.denoiser import Denoiser

RULES = ("float", "bfloat16")  # of `samplers.time`, that a derivative passes through


@dataclass(frozen=True)
class Consistency:
    """The half that keeps the student on the teacher's path, in every step of it."""

    loss: SCMLoss | DCMLoss
    times: Times | DiscreteTimes  # DiscreteTimes for DCMLoss
    weight: float = 100.0

    def __post_init__(self):
        _check_weight("consistency", self.weight)
        if isinstance(self.loss, DCMLoss) != isinstance(self.times, DiscreteTimes):
            raise UserError(
                f"{type(self.loss).__name__} can not train at {type(self.times).__name__}: DCMLoss needs "
                "DiscreteTimes, and SCMLoss any other"
            )

    @property
    def warmup_steps(self) -> int:
        return self.loss.warmup_steps if isinstance(self.loss, SCMLoss) else 0


@dataclass(frozen=True)
class Matching:
    """The half that matches what the student makes, in so many steps, to the teacher's distribution.

    The student takes one turn in student_every, a critic that learns what it makes all others.
    """

    times: Times  # at which critic and teacher are asked
    rollout: RandomRollout | FixedRollout
    weight: float = 1.0
    student_every: int = 5
    steps: Sequence[int] = (1, 2, 3, 4)  # that the student is simulated with, in turn
    loss: DMDLoss = field(default_factory=DMDLoss)
    critic: CriticLoss = field(default_factory=CriticLoss)

    def __post_init__(self):
        _check_weight("matching", self.weight)
        if self.student_every < 2:
            raise UserError(f"student_every={self.student_every}: at least 2, or the critic never learns")
        if not self.steps or min(self.steps) < 1:
            raise UserError(f"steps={list(self.steps)}: simulate at least one")
        if isinstance(self.rollout, FixedRollout):
            # refuses here, rather than in the middle of a run, what it has no times for
            self.rollout(max(self.steps), 1, Generator())


@dataclass(frozen=True)
class Method:
    """What the presets differ in.  Either half may be None.

    guidance is the teacher's, distilled into the student; timesteps says how every network is told the time.
    """

    consistency: Consistency | None
    matching: Matching | None
    guidance: float = 5.0
    timesteps: str = "float"

    def __post_init__(self):
        if self.consistency is None and self.matching is None:
            raise UserError("consistency and matching are both null: nothing is left to train with")
        if self.timesteps not in RULES:
            raise UserError(
                f"timesteps={self.timesteps}: take {' or '.join(RULES)}; whole numbers have no derivative"
            )
        if self.takes_differences and self.timesteps != "float":
            raise UserError(
                f"jvp=finite_difference with timesteps={self.timesteps}: the difference is lost in rounding; "
                "take timesteps=float or jvp=forward_ad"
            )

    @property
    def takes_differences(self) -> bool:
        loss = None if self.consistency is None else self.consistency.loss
        return isinstance(loss, SCMLoss) and loss.jvp == "finite_difference"

    @property
    def needs_clips(self) -> bool:
        """Whether prompts alone are too little: consistency, and an expert's rollout, start from clips."""
        rollout = None if self.matching is None else self.matching.rollout
        starts_late = isinstance(rollout, RandomRollout) and rollout.start < 1
        return self.consistency is not None or starts_late

    @property
    def has_critic(self) -> bool:
        return self.matching is not None

    @property
    def warmup_steps(self) -> int:
        """Steps of pure consistency before matching begins."""
        return 0 if self.consistency is None else self.consistency.warmup_steps

    def is_student_turn(self, step: int) -> bool:
        late = step - self.warmup_steps
        return self.matching is None or late < 0 or late % self.matching.student_every == 0

    def student_updates(self, step: int) -> int:
        """Turns that the student had before `step`, but for the one that the critic's round began with."""
        late = step - self.warmup_steps
        if self.matching is None or late < 0:
            return step
        return self.warmup_steps + late // self.matching.student_every

    def rollout_steps(self, step: int) -> int:
        """How many steps whoever has the turn simulates the student with."""
        updates = self.student_updates(step)
        if not self.is_student_turn(step):
            updates = step - updates - 1
        return self.matching.steps[updates % len(self.matching.steps)]

    def build(
        self, student: nn.Module, teacher: nn.Module, critic: nn.Module | None, negative: Tensor | None
    ) -> "RCM":
        """The objective."""
        return RCM(self, student, teacher, critic, negative)


@dataclass(frozen=True)
class RCM:
    """Trains "student", and "critic" if there is matching, towards a frozen teacher: WanModels of one size.

    negative (1, S, E): what guidance leads away from, for guidance other than 1.
    """

    method: Method
    student: nn.Module
    teacher: nn.Module
    critic: nn.Module | None = None
    negative: Tensor | None = None

    averaged = ("student",)

    def __post_init__(self):
        check_negative(self.method, self.negative)
        assert (self.critic is None) == (self.method.matching is None)
        is_rounded = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.student.parameters())
        if self.method.takes_differences and is_rounded:
            raise UserError(
                "jvp=finite_difference with a bfloat16 student: the difference is lost in rounding; "
                "take precision=float32 or jvp=forward_ad"
            )

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student} | ({} if self.critic is None else {"critic": self.critic})

    def turn(self, step: int) -> str:
        return "student" if self.method.is_student_turn(step) else "critic"

    def losses(self, batch: Example, step: int, rng: Generator, watch: Watch) -> Iterator[tuple[str, Tensor]]:
        """Named consistency, matching or critic; raises UserError where clips are needed and not there."""
        if self.method.needs_clips and not batch.has_clips:
            raise UserError(
                "these data hold prompts alone, which only the dmd preset can train on; give clips"
            )
        if self.turn(step) == "critic":
            yield "critic", self._critic_loss(batch, step, rng, watch)
            return
        if self.method.consistency is not None:
            yield "consistency", self._consistency_loss(batch, step, rng, watch)
        if self.method.matching is not None and step >= self.method.warmup_steps:
            yield "matching", self._matching_loss(batch, step, rng, watch)

    def view(self, network: nn.Module, batch: Example) -> Denoiser:
        """velocity(x, s) of a network on the batch's prompts."""
        return batch.view(network, self.method.timesteps)

    def guided(self, batch: Example) -> Denoiser:
        """The teacher's velocity, with guidance."""
        view = self.view(self.teacher, batch)
        return replace(view, negative=self.negative, guidance=self.method.guidance)

    def _consistency_loss(self, batch: Example, step: int, rng: Generator, watch: Watch) -> Tensor:
        part, noise = self.method.consistency, batch.noise(rng)
        times = part.times(len(noise), rng)
        student, teacher = self.view(self.student, batch), self.guided(batch)
        return part.weight * part.loss(student, teacher, batch.latents, noise, times, step, watch=watch)

    def _matching_loss(self, batch: Example, step: int, rng: Generator, watch: Watch) -> Tensor:
        part, x0 = self.method.matching, self._rollout(batch, step, rng)
        noise, s = batch.noise(rng), part.times(len(x0), rng)
        critic, teacher = self.view(self.critic, batch), self.guided(batch)
        return part.weight * part.loss(critic, teacher, x0, noise, s, watch=watch)

    def _critic_loss(self, batch: Example, step: int, rng: Generator, watch: Watch) -> Tensor:
        part = self.method.matching
        with torch.no_grad():
            x0 = self._rollout(batch, step, rng)
        noise, s = batch.noise(rng), part.times(len(x0), rng)
        loss = part.critic(self.view(self.critic, batch), x0, noise, s)
        watch("critic/loss", loss, s)
        return loss

    def _rollout(self, batch: Example, step: int, rng: Generator) -> Tensor:
        """The student's x0; from the clips' own noisy states where an expert's times begin below 1."""
        steps = self.method.rollout_steps(step)
        times = self.method.matching.rollout(steps, len(batch.latents), rng)
        start = add_noise(batch.latents, batch.noise(rng), times[0])
        return simulate(self.view(self.student, batch), start, times, lambda: batch.noise(rng))


def check_negative(method: Method, negative: object) -> None:
    """Raises UserError where guidance lacks what it leads away from."""
    if method.guidance != 1 and negative is None:
        raise UserError(
            f"guidance={method.guidance} needs negative=, the embedding of the negative prompt: without it "
            "guidance would do nothing"
        )


def _check_weight(name: str, weight: float) -> None:
    if not weight > 0:
        raise UserError(f"{name}.weight={weight} must be positive; {name}=null leaves that half out")
