"""The trainer: it knows steps, roles and files, and nothing of diffusion."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from distill import replicas
from distill.checkpoint import TrainState, resume_run, save_run
from distill.ema import PowerEMA
from distill.interrupt import Interrupt
from distill.log import Log
from distill.objective import Parts, seed_of
from distill.optim import Optim
from distill.origin import origin
from distill.precision import Masters
from distill.preview import save_preview
from turbodiffusion import checkpoints
from turbodiffusion.errors import UserError


@dataclass(frozen=True)
class Plan:
    """How long to train and what to do on the way; intervals in steps.

    With max_minutes the run is done at `steps` or when that much time was spent in the loop (over all
    sessions, previews included), whichever is first, and the learning rate follows
    max(step / steps, time / max_minutes): a run on a lent machine still anneals to zero.  Only a run without
    max_minutes repeats bit for bit.
    """

    steps: int
    max_minutes: float | None = None
    accumulate: int = 1  # batches a step
    max_grad_norm: float = 1.0
    ema_width: float = 0.1
    seed: int = 0
    log_every: int = 25
    save_every: int = 1000
    preview_every: int = 1000

    def __post_init__(self) -> None:
        counts = ("steps", "accumulate", "log_every", "save_every", "preview_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")

    def progress(self, state: TrainState) -> float:
        """Share of the run that is done."""
        share = state.step / self.steps
        return share if self.max_minutes is None else max(share, state.seconds / 60 / self.max_minutes)


class Trainer:
    """Trains an objective's networks and writes everything under `folder`; optims by role, or "default".

    `checkpoint/step-N` resumes the run, `previews` shows it, `log.jsonl` tells it, and the outcome's products
    lie beside them.  A trainer on the same folder continues where the last one stopped.
    """

    def __init__(self, parts: Parts, *, optims: Mapping[str, Optim], plan: Plan, folder: Path):
        self.objective, self.data, self.outcome = parts.objective, parts.data, parts.outcome
        self.plan, self.folder = plan, folder
        self.masters = {role: Masters(network) for role, network in self.objective.networks.items()}
        self.optims = {role: optims.get(role, optims["default"]) for role in self.masters}
        self.device = next(next(iter(self.objective.networks.values())).parameters()).device
        self.averages = {
            role: PowerEMA(self.masters[role], plan.ema_width) for role in self.objective.averaged
        }
        self.state = TrainState(
            optimizers={
                role: self.optims[role].build(masters.weights.values())
                for role, masters in self.masters.items()
            },
            updates=dict.fromkeys(self.masters, 0),
        )
        self.origin = origin(self.device)
        self.log = Log(folder / "log.jsonl", plan.log_every, self.device)
        resume_run(folder / "checkpoint", self.state, self._saved_networks())

    def fit(self) -> None:
        """Train until the plan is fulfilled or Ctrl-C, then save."""
        before, started = self.state.seconds, time.perf_counter()
        if self.state.step:
            self.log.say(f"{self.folder} goes on from step {self.state.step}")
        with self.log, Interrupt() as interrupt:
            while not self._is_done() and not interrupt.requested:
                self.update()
                self._agree(before + time.perf_counter() - started, interrupt)
                if not self._is_done():
                    self._on_the_way()
            self.save()
            # also for a run that was done: it may have been killed right here
            self.report()
        self.log.say(f"{self.folder} is saved at step {self.state.step}; raise steps= to train on")
        if interrupt.requested:
            raise KeyboardInterrupt

    def update(self) -> None:
        """One step of the role whose turn it is."""
        step, count = self.state.step, self.plan.accumulate
        role = self.objective.turn(step)
        masters, optimizer = self.masters[role], self.state.optimizers[role]
        samples, updates = 0, self.state.updates[role]
        for i in replicas.numbers(step, count):
            for name, loss in self.objective.losses(self.data.batch(i), step, self._rng(i), self.log.watch):
                (loss.mean() / count).backward()
                masters.collect()
                self.log.add(f"loss/{name}", loss)
            samples += len(loss) * replicas.world_size()
        replicas.average(w.grad for w in masters.weights.values() if w.grad is not None)
        norm = nn.utils.clip_grad_norm_(list(masters.weights.values()), self.plan.max_grad_norm)
        # the one wait for the device in a step: the optimiser must not see a bad gradient
        if not norm.isfinite():
            raise UserError(
                f"the gradient norm of {role} is {norm.item()} at step {step}: stopped before the step; "
                f"lower optim.lr or go on from the last checkpoint with another seed="
            )
        rate = self.optims[role].rate(updates, self.plan.progress(self.state))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        masters.publish()
        if role in self.averages:
            self.averages[role].update(masters, updates)
        self.state.updates[role] += 1
        self.state.step += 1
        self.log.add(f"grad_norm/{role}", norm)
        self.log.step(self.state.step, self.plan.progress(self.state), samples, rate)

    def save(self) -> None:
        """Write a checkpoint from which the run continues exactly."""
        if replicas.rank() == 0:
            save_run(self.folder / "checkpoint", self.state, self._saved_networks())

    def report(self) -> None:
        """Measure the averaged networks, draw what they make, and write the files they ship as."""
        if replicas.rank() > 0:
            return
        averaged = {role: average.module for role, average in self.averages.items()}
        measures = self.outcome.measure(averaged)
        self.log.record(self.state.step, measures)
        if measures:
            self.log.say("  ".join(f"{name} {value:.4g}" for name, value in measures.items()))
        clips = self.outcome.preview(averaged)
        if clips is not None:
            save_preview(clips, self.folder / "previews" / f"step-{self.state.step:07d}")
        entry = {
            "trained": self.folder.name,
            "steps": self.state.step,
            "minutes": round(self.state.seconds / 60, 1),
            "on": self.origin,
            "measures": measures,
        }
        for product in self.outcome.products(averaged):
            checkpoints.save(
                self.folder / f"{product.name}.safetensors",
                product.module,
                sampling=product.sampling,
                variant=product.variant,
                history=[*product.history, entry],
            )

    def _agree(self, seconds: float, interrupt: Interrupt) -> None:
        """Have every rank stop at the same step."""
        self.state.seconds, requested = replicas.from_first([seconds, interrupt.requested], self.device)
        interrupt.requested = bool(requested)

    def _is_done(self) -> bool:
        return self.plan.progress(self.state) >= 1

    def _on_the_way(self) -> None:
        for every, deed in ((self.plan.save_every, self.save), (self.plan.preview_every, self.report)):
            if self.state.step % every == 0:
                deed()
                self.log.restart_clock()

    def _rng(self, number: int) -> torch.Generator:
        """Randomness of batch `number`, the same however often the run was resumed."""
        return torch.Generator(self.device).manual_seed(seed_of("noise", self.plan.seed, number))

    def _saved_networks(self) -> dict[str, nn.Module | Masters]:
        averages = {f"{role}_ema": average.module for role, average in self.averages.items()}
        return self.masters | averages
