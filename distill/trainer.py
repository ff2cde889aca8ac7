"""The trainer: it knows steps, roles and files, and nothing of diffusion."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distill import replicas
from distill.checkpoint import Saver, TrainState, resume_run
from distill.ema import PowerEMA
from distill.interrupt import Interrupt
from distill.log import Log
from distill.objective import Parts, Product, seed_of
from distill.optim import Optim
from distill.origin import origin
from distill.precision import Masters, stored
from distill.sharding import whole
from distill.tracking import Tracker
from turbodiffusion import checkpoints
from turbodiffusion.errors import UserError
from turbodiffusion.parallel import started


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
    async_save: bool = False
    offload: bool = False  # fp32 weights, moments and averages live in the host's memory, and move there

    def __post_init__(self) -> None:
        counts = ("steps", "accumulate", "log_every", "save_every", "preview_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise UserError(f"max_minutes={self.max_minutes} must be more than 0, or null for no limit")
        if self.offload and started()[1] > 1:  # whose NCCL sums and gathers nothing on a host
            raise UserError("offload=true is for one process; several have less to hold each with shard=")

    def progress(self, state: TrainState) -> float:
        """Share of the run that is done."""
        share = state.step / self.steps
        return share if self.max_minutes is None else max(share, state.seconds / 60 / self.max_minutes)


class Trainer:
    """Trains an objective's networks and writes everything under `folder`; optims by role, or "default".

    `checkpoint/step-N` resumes the run, `previews` shows it, `log.jsonl` tells it, and the outcome's products
    lie beside them.  A trainer on the same folder continues where the last one stopped.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        optims: Mapping[str, Optim],
        plan: Plan,
        folder: Path,
        tracker: Tracker | None = None,
    ):
        self.objective, self.data, self.outcome = parts.objective, parts.data, parts.outcome
        self.plan, self.folder, self.context = plan, folder, parts.context
        home = torch.device("cpu") if plan.offload else None
        self.masters = {role: Masters(net, home) for role, net in self.objective.networks.items()}
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
        self.log = Log(folder / "log.jsonl", plan.log_every, self.device, tracker)
        self.losses: dict[str, Tensor] = {}  # of the step at hand
        self.saver = Saver(folder / "checkpoint", background=plan.async_save)
        if resume_run(folder / "checkpoint", self.state, self._tensors()):
            for masters in self.masters.values():
                masters.publish()

    def fit(self) -> None:
        """Train until the plan is fulfilled or Ctrl-C, then save."""
        before, begun = self.state.seconds, time.perf_counter()
        if self.state.step:
            self.log.say(f"{self.folder} goes on from step {self.state.step}")
        stop = False
        with self.log, Interrupt() as interrupt:
            while not (stop or self._is_done()):
                self.update()
                stop = self._agree(before + time.perf_counter() - begun, interrupt.requested)
                self.saver.check()
                if not self._is_done():
                    self._on_the_way()
            self.save()
            self.saver.wait()
            # also for a run that was done: it may have been killed right here
            self.report()
        self.log.say(f"{self.folder} is saved at step {self.state.step}; raise steps= to train on")
        if stop:
            raise KeyboardInterrupt

    def update(self) -> None:
        """One step of the role whose turn it is."""
        step = self.state.step
        role = self.objective.turn(step)
        masters, optimizer = self.masters[role], self.state.optimizers[role]
        samples = self._differentiate(masters, step)
        norm, updates = self._clip(masters, role), self.state.updates[role]
        rate = self.optims[role].rate(updates, self.plan.progress(self.state))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        masters.publish()
        if role in self.averages:
            self.averages[role].update(updates)
        self.state.updates[role] += 1
        self.state.step += 1
        self.log.add(f"grad_norm/{role}", norm)
        self.log.step(self.state.step, self.plan.progress(self.state), samples, rate)

    def _differentiate(self, masters: Masters, step: int) -> int:
        """Bring the masters the gradients of a step, averaged over the ranks; the number of samples."""
        count, samples = self.plan.accumulate, 0
        self.losses.clear()
        for i in replicas.numbers(step, count, self.context):
            for name, loss in self.objective.losses(self.data.batch(i), step, self._rng(i), self.log.watch):
                (loss.mean() / count).backward()
                masters.collect()
                self.log.add(f"loss/{name}", loss)
                self.losses[f"loss/{name} of batch {i}"] = loss.detach()
            samples += len(loss) * replicas.teams(self.context)
        grads = (weight.grad for weight in masters.weights.values() if weight.grad is not None)
        replicas.average(grads, self.context)
        return samples

    def _clip(self, masters: Masters, role: str) -> Tensor:
        """Limit the gradient's norm; what it was.  Raises UserError, on every rank, if it is not finite."""
        weights = list(masters.weights.values())
        norm = whole(nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None]))
        # the one wait for the device in a step: the optimiser must not see a bad gradient
        if not norm.isfinite():
            bad = [name for name, loss in self.losses.items() if not loss.isfinite().all()]
            raise UserError(
                f"the gradient norm of {role} is {norm.item()} at step {self.state.step} "
                f"(not finite: {', '.join(replicas.everyones(bad)) or 'no loss'}): stopped before the step; "
                "lower optims.default.lr or go on from the last checkpoint with another seed="
            )
        nn.utils.clip_grads_with_norm_(weights, self.plan.max_grad_norm, norm)
        return norm

    def save(self) -> None:
        """Write a checkpoint from which the run continues exactly."""
        self.saver.save(self.state, self._tensors())

    def report(self) -> None:
        """Measure the averaged networks, draw what they make, and write the files they ship as.

        Every rank does all of it, since it takes them all to run a sharded network; one of them writes.
        """
        with ExitStack() as stack:
            # compiled for the shapes of training, not for these
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            averaged = {role: stack.enter_context(ema.shown()) for role, ema in self.averages.items()}
            measures = self.outcome.measure(averaged)
            self.log.record(self.state.step, measures)
            if measures:
                self.log.say("  ".join(f"{name} {value:.4g}" for name, value in measures.items()))
            verdict = self.outcome.verdict(measures) if self._is_done() else None
            if verdict is not None:
                self.log.say(verdict)
            clips = self.outcome.preview(averaged)
            if clips is not None:
                self.log.show(self.state.step, clips)
            for product in self.outcome.products(averaged):
                self._ship(product, measures)

    def _ship(self, product: Product, measures: dict[str, float]) -> None:
        weights = stored(product.module, product.keep_fp32)
        if replicas.rank() > 0:
            return
        entry = {
            "trained": self.folder.name,
            "steps": self.state.step,
            "minutes": round(self.state.seconds / 60, 1),
            "on": self.origin,
            "measures": measures,
        }
        checkpoints.save(
            self.folder / f"{product.name}.safetensors",
            product.module,
            sampling=product.sampling,
            variant=product.variant,
            history=[*product.history, entry],
            weights=weights,
        )

    def _agree(self, seconds: float, requested: bool) -> bool:
        """Have every rank stop at the same step: a signal reaches them at different times."""
        self.state.seconds, stop = replicas.from_first([seconds, requested], self.device)
        return bool(stop)

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

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        networks = {role: masters.tensors() for role, masters in self.masters.items()}
        return networks | {f"{role}_ema": average.weights for role, average in self.averages.items()}
