"""What the tests of several processes run in each: `python -m tests.distill.ranks FOLDER`."""

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from distill.checkpoint import Saver
from distill.conditioning import Example
from distill.jvp import jvp
from distill.objective import Parts, Product
from distill.optim import Optim
from distill.rcm import RCM, Consistency, Matching, Method
from distill.recipes import Hardware
from distill.scm import SCMLoss
from distill.sharding import local, whole
from distill.times import LogNormal, RandomRollout, UniformShift
from distill.trainer import Plan, Trainer
from turbodiffusion.attention import Attention
from turbodiffusion.cli import one_sentence
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel
from turbodiffusion.parallel import joined, rank

CPU = torch.device("cpu")
PLAN = Plan(steps=6, log_every=100, save_every=100, preview_every=100)


class Noise:
    """Random examples of two clips; `spoil` sees each before it is used."""

    def __init__(
        self,
        spoil: Callable[[int, Example], Example] = lambda number, example: example,
        grid: tuple[int, int, int] = (2, 4, 4),
    ):
        self.spoil, self.grid = spoil, grid

    def batch(self, number: int) -> Example:
        rng = torch.Generator().manual_seed(number)
        latents, context = (torch.randn(2, *s, generator=rng) for s in ((4, *self.grid), (5, 16)))
        return self.spoil(number, Example(latents, context))


class Shipping:
    """Measures by running the network, and ships it."""

    def measure(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        example = Noise().batch(0)
        with torch.no_grad():
            velocity = networks["student"](example.latents, torch.ones(2), example.context)
        return {"size": velocity.norm().item()}

    def verdict(self, measures: dict[str, float]) -> None:
        return None

    def preview(self, networks: dict[str, nn.Module]) -> None:
        return None

    def products(self, networks: dict[str, nn.Module]) -> list[Product]:
        return [Product("student", networks["student"], keep_fp32=WanModel.is_fp32)]


@dataclass(frozen=True)
class Descent(Optim):
    """Plain gradient descent: unlike Adam's, its steps do not turn rounding of a zero gradient into moves."""

    def build(self, parameters: Iterator[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.lr)


ADAM = Optim(lr=1e-3, betas=(0.5, 0.9), warmup=2)
DESCENT = Descent(lr=1e-2, warmup=1, decay="constant")
STEADY = {"descent": DESCENT, "muon": Optim(lr=1e-3, warmup=1, decay="constant", matrices="muon")}


def tiny_network() -> WanModel:
    torch.manual_seed(0)
    network = WanModel(
        dim=32, ffn_dim=48, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=16, text_length=6
    )
    nn.init.normal_(network.head.head.weight, std=0.1)
    return network


def rcm(hardware: Hardware, attention: Attention | None = None) -> RCM:
    """Student and critic in turns, the teacher a little off where they start; attention: the student's."""
    teacher = tiny_network().requires_grad_(False)
    student, critic = (deepcopy(teacher).requires_grad_(True) for _ in range(2))
    nn.init.normal_(teacher.head.head.weight, std=0.2)
    student.set_attention(attention or {})
    for network in (teacher, student, critic):
        hardware.prepare(network, WanModel.is_fp32, network.shard_units(), can_shard=True)
    times = UniformShift(5.0)
    method = Method(
        Consistency(SCMLoss(warmup_steps=2), LogNormal(0.0, 1.0)),
        Matching(times, RandomRollout(times), student_every=2, steps=(1, 2)),
        guidance=2.0,
    )
    return RCM(method, student, teacher, critic, torch.zeros(1, 5, 16))


def make_trainer(
    folder: Path,
    *,
    shard: int = 1,
    context: int = 1,
    attention: Attention | None = None,
    optim: Optim = ADAM,
    data: Noise | None = None,
    **plan: float,
) -> Trainer:
    objective = rcm(Hardware(CPU, torch.float32, None, shard, context), attention)
    parts = Parts(objective, data or Noise(), Shipping(), context)
    return Trainer(parts, optims={"default": optim}, plan=replace(PLAN, **plan), folder=folder)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All that training changes, by name; sharded tensors as they are."""
    found = {}
    for role, masters in trainer.masters.items():
        for name, weight in masters.weights.items():
            found[f"{role}/{name}"] = weight.detach()
            for kind, value in trainer.state.optimizers[role].state.get(weight, {}).items():
                found[f"{role}/{name}/{kind}"] = value
    for role, average in trainer.averages.items():
        found |= {f"{role}_ema/{name}": weight for name, weight in average.weights.items()}
    return found


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(value.size, dtype=value.properties.dtype) for name, value in stored.items()}
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        dcp.load(tensors, checkpoint_id=path)
    return tensors


def compare_tangents() -> dict[str, float]:
    """The largest errors of a sharded network's tangent, and of its gradients after that pass."""
    plain = tiny_network()
    sharded = rcm(Hardware(CPU, torch.float32, None, 2)).student
    rng = torch.Generator().manual_seed(1)
    x, dx, context = (torch.randn(2, *s, generator=rng) for s in ((4, 2, 4, 4), (4, 2, 4, 4), (5, 16)))
    s, ds = 1000 * torch.rand(2, generator=rng), torch.ones(2)
    tangents = [jvp(net, (x, s), (dx, ds), context)[1] for net in (sharded, plain)]
    for net in (sharded, plain):
        net(x, s, context).square().mean().backward()
    pairs = zip(sharded.parameters(), plain.parameters(), strict=True)
    gradient = max((whole(ours.grad) - theirs.grad).abs().max().item() for ours, theirs in pairs)
    return {"tangent": (tangents[0] - tangents[1]).abs().max().item(), "gradient": gradient}


def resume(folder: Path) -> dict[str, object]:
    """Names of what differs on this rank after 6 steps and after 3 + a new trainer's 3."""
    uninterrupted = make_trainer(folder / "whole", shard=2)
    uninterrupted.fit()
    first = make_trainer(folder / "broken", shard=2)
    for _ in range(3):
        first.update()
    first.save()
    second = make_trainer(folder / "broken", shard=2)
    resumed = second.state.step
    second.fit()
    ours, theirs = everything(second), everything(uninterrupted)
    wrong = [name for name, value in theirs.items() if not torch.equal(local(value), local(ours[name]))]
    kept = {name: whole(value) for name, value in theirs.items()}
    if rank() == 0:
        torch.save(kept, folder / "whole.pt")
    second_moments = [local(v).sum().item() for name, v in theirs.items() if name.endswith("exp_avg_sq")]
    return {"at": resumed, "wrong": wrong, "names": sorted(theirs), "moments": sum(second_moments)}


def save_both_ways(folder: Path, shard: int) -> None:
    """One state to FOLDER/sync and FOLDER/async, which changes before the second is written."""
    trainer = make_trainer(folder / "ways", shard=shard)
    for _ in range(3):
        trainer.update()
    for name in ("sync", "async"):
        trainer.saver = Saver(folder / name, background=name == "async")
        trainer.save()
    trainer.update()
    trainer.saver.wait()


def clip(folder: Path) -> dict[str, float]:
    """Norms of the gradient before and after clipping."""
    trainer = make_trainer(folder / "clip", shard=2, max_grad_norm=1e-2)
    seen = []
    trainer.state.optimizers["student"].register_step_pre_hook(
        lambda optimizer, args, kwargs: seen.extend(
            whole(p.grad) for group in optimizer.param_groups for p in group["params"]
        )
    )
    trainer.update()
    before = trainer.log.sums["grad_norm/student"].item()
    return {"before": before, "after": nn.utils.get_total_norm(seen).item()}


def poison(folder: Path) -> dict[str, object]:
    """The error of a run that meets a NaN on rank 1 at step 4."""

    def spoil(number: int, example: Example) -> Example:
        # with two ranks, step 4 has batches 8 and 9
        return replace(example, latents=example.latents * torch.nan) if number == 9 else example

    trainer = make_trainer(folder / "poison", shard=2, data=Noise(spoil), save_every=3)
    try:
        trainer.fit()
    except UserError as error:
        return {"error": str(error)}
    return {"error": None}


def interrupt(folder: Path) -> int:
    """The step at which both ranks stop; the signal reaches rank 1 between two steps, rank 0 in the next."""

    def signalled() -> None:
        if (rank(), trainer.state.step) in ((1, 2), (0, 3)):
            os.kill(os.getpid(), signal.SIGINT)

    trainer = make_trainer(folder / "interrupted", save_every=1)
    save = trainer.save
    trainer.save = lambda: (save(), signalled())
    with suppress(KeyboardInterrupt):
        trainer.fit()
    return trainer.state.step


def equal(folder: Path, shard: int, optim: str) -> None:
    """Five clipped steps by one of STEADY; all weights and averages to equal-SHARD-OPTIM.pt."""
    name = f"equal-{shard}-{optim}"
    trainer = make_trainer(folder / name, shard=shard, optim=STEADY[optim], steps=5)
    trainer.fit()
    found = {name: whole(value) for name, value in everything(trainer).items()}
    if rank() == 0:
        torch.save(found, folder / f"{name}.pt")


def stop_one_rank(folder: Path) -> None:
    """Train, but for rank 1, which can not read its data at step 2."""

    def spoil(number: int, example: Example) -> Example:
        if number == 5:
            raise UserError("shard 7 is torn")
        return example

    make_trainer(folder / "torn", shard=2, data=Noise(spoil), save_every=1).fit()


def together(folder: Path) -> None:
    """On two ranks: everything that ends well, then what does not."""
    with joined(CPU):
        for shard in (1, 2):
            equal(folder, shard, "descent")
        equal(folder, 2, "muon")
        results = {
            "tangents": compare_tangents(),
            "resume": resume(folder),
            "clip": clip(folder),
            "poison": poison(folder),
            "interrupt": interrupt(folder),
        }
        save_both_ways(folder, 2)
        (folder / f"rank{rank()}.json").write_text(json.dumps(results))
        stop_one_rank(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with one_sentence():
        together(Path(sys.argv[1]))
