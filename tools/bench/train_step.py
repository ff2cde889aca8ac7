"""Time and memory of a training step at real size, random weights, by what is recomputed, beside the floor.

    python -m tools.bench.train_step variant=wan2.1_t2v_1.3b remat=keep_attention,block,none
    python -m tools.bench.train_step variant=wan2.1_t2v_14b block=true      # one block, times their number
    python -m tools.bench.train_step experiment=sla_wan1_3b remat=block     # tuning for sparse attention
    torchrun --nproc-per-node=2 -m tools.bench.train_step shard=2 remat=block     # on several cards

Timed: all that distill/trainer.py does in turns of an experiment's networks on one clip, but data; the device
is waited for between the parts; medians over `steps` turns after one of warm-up.  ratio, block_q and block_k
are of sparse attention.  layers: fewer than the variant's, if all do not fit.  Of several cards, of which
`shard` hold the weights together and `context` share a clip's tokens, all times and peaks are the first's.

floor: FLOP / 790 TFLOP/s.  Of N blocks of width D (F inside), L tokens and S of text: linear layers
N (4 L D (3 D + F) + 4 S D^2), attention N 4 L D (L + S).  A forward takes both once, a tangent pass linear
twice and attention 3 times, a forward with backward 3 and 3.5 times.  The "full step" is two passes of the
teacher, a tangent pass, and a forward with backward of student and of critic.
"""

import statistics
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table
from torch import Tensor

from distill.conditioning import Example
from distill.objective import Objective, Parts
from distill.recipes import Hardware
from distill.trainer import Trainer
from tools.bench.forward import Network, latent_size, network_inputs, random_network, shortened
from tools.bench.train_block import REST, Clock, floors, time_block
from tools.options import run
from turbodiffusion.models.wan import WanModel
from turbodiffusion.parallel import joined, started
from turbodiffusion.variants import CONFIGS, variant

Key = tuple[str, str]  # a loss, or whose turn it is, and a part of its work
# least work of rCM.  A rollout is of 1 to 4 passes; the last has a graph in the student's turn
PARTS: dict[Key, tuple[float, str]] = {
    ("consistency", "teacher"): (2, "forward"),
    ("consistency", "tangent"): (1, "tangent"),
    ("consistency", "training"): (1, "training"),
    ("matching", "rollout"): (1.5, "forward"),
    ("matching", "training"): (1, "training"),
    ("matching", "teacher"): (2, "forward"),
    ("matching", "critic"): (1, "forward"),
    ("student", REST): (0, "forward"),
    ("critic", "rollout"): (2.5, "forward"),
    ("critic", "training"): (1, "training"),
    ("critic", REST): (0, "forward"),
}
FULL_STEP = [*list(PARTS)[:3], ("critic", "training")]


@dataclass
class Options(Network):
    """The command line."""

    experiment: str = "rcm_wan1_3b"
    remat: str = "keep_attention,block,none"  # the one that may not fit last
    steps: int = 2
    block: bool = False
    layers: int | None = None
    shard: int = 1
    context: int = 1
    offload: bool = False


class Timed:
    """An objective whose passes and backwards are marked: seconds by loss and part, and of the rest."""

    def __init__(self, objective: Objective, clock: Clock):
        self.objective, self.clock = objective, clock
        self.networks, self.averaged, self.turn = objective.networks, objective.averaged, objective.turn
        self.seconds: dict[Key, list[float]] = {}
        for role, network in {"teacher": objective.teacher, **self.networks}.items():
            clock.follow(network, role)

    def losses(self, batch: Example, step: int, *others: object) -> Iterator[tuple[str, Tensor]]:
        """Those of the objective; whoever takes one differentiates it and asks for the next."""
        for name, loss in self.objective.losses(batch, step, *others):
            self.clock.mark(REST)
            yield name, loss
            self.clock.mark("training")
            self.file(name, self.turn(step))

    def file(self, name: str, role: str) -> None:
        """What the clock has belongs to this loss, and what it can not name to the role."""
        for part, spent in self.clock.take().items():
            key = (role, REST) if part == REST else (name, part)
            self.seconds.setdefault(key, []).extend(spent)


def machine(options: Options, mode: str) -> Hardware:
    """This card, alone or beside others."""
    named = {"precision": "bfloat16", "compile": options.compile, "remat": mode}
    return Hardware.named(options.device, **named, shard=options.shard, context=options.context)


def trainer(options: Options, mode: str, example: Example, clock: Clock, folder: Path) -> Trainer:
    """Of networks that begin as one, as the experiment would be run."""
    words = [f"experiment={options.experiment}", "tangent_warmup=0", f"offload={options.offload}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", words)
    row, device = shortened(variant(options.variant), options.layers), example.latents.device
    torch.manual_seed(0)  # the same weights on all cards
    teacher = random_network(row, device, torch.bfloat16)
    student = deepcopy(teacher)
    if "attention" in config.recipe:
        blocks = {"ratio": options.ratio, "block_q": options.block_q, "block_k": options.block_k}
        student.set_attention({"name": "sla", **blocks})
    method = instantiate(config.recipe.objective)
    critic = deepcopy(teacher) if method.has_critic else None
    hardware = machine(options, mode)
    for network in filter(None, (teacher, student, critic)):
        network.requires_grad_(network is not teacher)
        hardware.prepare(network, WanModel.is_fp32, network.shard_units(), can_shard=True)
    negative = torch.randn_like(example.context) if method.has_critic else None
    objective = Timed(method.build(student, teacher, critic, negative), clock)
    optims = {role: instantiate(optim) for role, optim in config.optims.items()}
    plan = replace(instantiate(config.plan), accumulate=1)
    one_clip = SimpleNamespace(batch=lambda number: example)
    # what a run makes at its end is not reached
    parts = Parts(objective, one_clip, None, options.context)
    return Trainer(parts, optims=optims, plan=plan, folder=folder)


def time_turn(trainer: Trainer, clock: Clock, step: int) -> dict[Key, list[float]]:
    """Seconds of every part of a step."""
    timed, trainer.state.step = trainer.objective, step
    clock.mark(REST)
    clock.take()
    timed.seconds = {}
    trainer.update()
    clock.mark(REST)
    timed.file("", timed.turn(step))
    return timed.seconds


def time_mode(options: Options, mode: str, example: Example, clock: Clock) -> dict[Key, float]:
    """Median seconds by loss and part; the peak of memory is counted from after the warm-up."""
    turns = []
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(options, mode, example, clock, Path(folder))
        every = made.objective.objective.method.matching.student_every if len(made.masters) > 1 else 1
        for k in range(options.steps + 1):
            # simulated in k + 1 steps; the critic's always in two
            turns.append(time_turn(made, clock, every * k))
            if every > 1:
                turns[-1] |= time_turn(made, clock, every * k + 2)
            if not k:
                clock.reset_peak()
    medians = {}
    for key in dict.fromkeys(key for turn in turns[1:] for key in turn):
        seen = [turn[key] for turn in turns[1:] if key in turn]
        is_rollout = key[1] == "rollout"
        of_passes = statistics.median([seconds for turn in seen for seconds in turn])
        medians[key] = PARTS[key][0] * of_passes if is_rollout else statistics.median(map(sum, seen))
    return medians


def show(columns: dict[str, dict[Key, float]], console: Console) -> None:
    """The table: parts, then turns and steps; of rCM the floor beside them."""
    found = dict.fromkeys(key for column in columns.values() for key in column)
    keys = [key for key in PARTS if key in found] + [key for key in found if key not in PARTS]
    table = Table("loss", "seconds of", *columns)
    for key in keys:
        table.add_row(*key, *(f"{column[key]:.3f}" for column in columns.values()))
    table.add_section()
    sums = {"a student's turn": [key for key in keys if key[0] != "critic"]}
    if ("critic", REST) in keys:
        sums |= {"a critic's turn": [key for key in keys if key[0] == "critic"], "full step": FULL_STEP}
    for name, parts in sums.items():
        table.add_row("", name, *(f"{sum(column[key] for key in parts):.2f}" for column in columns.values()))
    console.print(table)


def time_steps(options: Options, tokens: int, example: Example, console: Console) -> None:
    """Every mode in turn, then the table."""
    network, columns = {"text_length": 512} | shortened(variant(options.variant), options.layers).network, {}
    if options.experiment.startswith("rcm"):
        least = floors(network, tokens)
        columns["floor"] = {key: passes * least[kind] for key, (passes, kind) in PARTS.items()}
    for mode in options.remat.split(","):
        clock = Clock(example.latents.device)
        try:
            columns[mode] = time_mode(options, mode, example, clock)
            console.print(f"remat={mode}: peak {clock.gib('max_memory_allocated'):.1f} GiB")
        except RuntimeError as error:
            if "out of memory" not in str(error):  # a library's own words are no torch.OutOfMemoryError
                raise
            console.print(f"remat={mode}: out of memory: {str(error)[:200]}")
        clock.forget()  # out here, where the error no longer holds the graph
    show(columns, console)


def time_whichever(options: Options, device: torch.device, console: Console) -> None:
    """A block, or steps, as asked for."""
    row = shortened(variant(options.variant), options.layers)
    frames, height, width = latent_size(row, options.size, options.frames)
    grid = (frames, height // 2, width // 2)
    if options.block:
        network = random_network(shortened(row, 1), device, torch.bfloat16)
        network.config["layers"] = row.network["layers"]
        time_block(network, grid, options.remat.split(","), options.steps, console)
        return
    torch.manual_seed(0)
    inputs = network_inputs(row, (frames, height, width), device)
    example = Example(inputs["x"], inputs["context"], inputs["condition"], inputs["clip"])
    time_steps(options, grid[0] * grid[1] * grid[2], example, console)


def report(options: Options) -> None:
    """Join the others, build, time, print."""
    rank, cards = started()
    console, device = Console(width=120, quiet=rank > 0), machine(options, "none").device
    name = "CPU" if device.type == "cpu" else torch.get_device_module(device).get_device_name()
    said = f"{cards} x {name}, torch {torch.__version__}, {options}"
    console.print(said, markup=False, highlight=False)
    with joined(device):
        time_whichever(options, device, console)


main = partial(run, Options, report)

if __name__ == "__main__":
    main()
