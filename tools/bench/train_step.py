"""Time and memory of rCM at real size, random weights, by what is recomputed, beside the floor.

    python -m tools.bench.train_step variant=wan2.1_t2v_1.3b remat=keep_attention,block,none
    python -m tools.bench.train_step variant=wan2.1_t2v_14b block=true      # one block, times their number

Timed: all that experiment=rcm_wan1_3b does in a turn of the student and of the critic on one clip, but data,
files and log; the device is waited for between the parts; medians over `steps` turns after one of warm-up.

floor: FLOP / 790 TFLOP/s.  Of N blocks of width D (F inside), L tokens and S of text: linear layers
N (4 L D (3 D + F) + 4 S D^2), attention N 4 L D (L + S).  A forward takes both once, a tangent pass linear
twice and attention 3 times, a forward with backward 3 and 3.5 times.  The "full step" is two passes of the
teacher, a tangent pass, and a forward with backward of student and of critic.
"""

import gc
import statistics
import sys
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table
from torch import nn

from distill.conditioning import Example
from distill.ema import PowerEMA
from distill.objective import unwatched
from distill.precision import Masters
from distill.rcm import RCM
from distill.recipes import Hardware
from tools.bench.forward import latent_size, network_inputs, random_network
from tools.bench.train_block import REST, Clock, floors, time_block
from tools.options import parse
from turbodiffusion.models.wan import WanModel
from turbodiffusion.variants import CONFIGS, variant

# (loss, part) -> least work.  A rollout is of 1 to 4 passes; the last has a graph in the student's turn
PARTS = {
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
SUMS = {
    "a student's turn": [key for key in PARTS if key[0] != "critic"],
    "a critic's turn": [key for key in PARTS if key[0] == "critic"],
    "full step": [*list(PARTS)[:3], ("critic", "training")],
}


@dataclass
class Options:
    """The command line."""

    variant: str = "wan2.1_t2v_1.3b"
    size: str = "832x480"
    frames: int = 81
    remat: str = "keep_attention,block,none"  # the one that may not fit last
    steps: int = 2
    block: bool = False
    compile: bool = False
    device: str = "cuda"


class Bench:
    """An rCM with masters, optimisers and average, on one synthetic clip."""

    def __init__(self, network: WanModel, example: Example):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("train", ["experiment=rcm_wan1_3b", "tangent_warmup=0"])
        student, critic = (deepcopy(network).requires_grad_(True) for _ in range(2))
        negative = torch.randn_like(example.context)
        self.rcm = RCM(instantiate(config.recipe.objective), student, network, critic, negative)
        self.example, self.device = example, example.latents.device
        self.clock = Clock(self.device)
        self.masters = {role: Masters(module) for role, module in self.rcm.networks.items()}
        optims = {"student": config.optims.default, "critic": config.optims.critic}
        self.optimizers = {
            role: instantiate(optims[role]).build(masters.weights.values())
            for role, masters in self.masters.items()
        }
        self.average = PowerEMA(self.masters["student"], config.plan.ema_width)
        self.modules = {"teacher": network, **self.rcm.networks}
        for role, module in self.modules.items():
            self.clock.follow(module, role)

    def turn(self, step: int) -> dict[tuple[str, str], list[float]]:
        """One step as distill/trainer.py takes it: seconds of every pass, by loss and part."""
        role, seconds, rest = self.rcm.turn(step), {}, []
        masters, optimizer = self.masters[role], self.optimizers[role]
        rng = torch.Generator(self.device).manual_seed(step)
        self.clock.mark(REST)
        self.clock.take()
        for name, loss in self.rcm.losses(self.example, step, rng, unwatched):
            self.clock.mark(REST)
            loss.mean().backward()
            self.clock.mark("training")
            masters.collect()
            self.clock.mark(REST)
            parts = self.clock.take()
            rest += parts.pop(REST)
            seconds |= {(name, part): spent for part, spent in parts.items()}
        norm = nn.utils.get_total_norm([weight.grad for weight in masters.weights.values()])
        if not (norm.isfinite() and norm > 0):
            raise SystemExit(f"the gradient norm is {norm.item()}: not a time to quote")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        masters.publish()
        if role == "student":
            self.average.update(step)
        self.clock.mark(REST)
        return seconds | {(role, REST): rest + self.clock.take()[REST]}

    def measure(self, hardware: Hardware, steps: int) -> dict[tuple[str, str], float]:
        """Median seconds by loss and part; the peak of memory is counted from after the warm-up."""
        for module in self.modules.values():
            hardware.prepare(module, WanModel.is_fp32, module.shard_units())
        every, turns = self.rcm.method.matching.student_every, []
        for k in range(steps + 1):
            # simulated in k + 1 steps; the critic's always in two
            turns.append(self.turn(every * k) | self.turn(every * k + 2))
            if not k:
                self.clock.reset_peak()
        medians = {}
        for key, (passes, _) in PARTS.items():
            seen = [turn[key] for turn in turns[1:] if key in turn]
            of_a_pass = statistics.median([seconds for turn in seen for seconds in turn])
            is_rollout = key[1] == "rollout"
            medians[key] = passes * of_a_pass if is_rollout else statistics.median(map(sum, seen))
        return medians

    def forget(self) -> None:
        """Drop what a step that ran out of memory left behind."""
        for role, masters in self.masters.items():
            masters.module.zero_grad(set_to_none=True)
            self.optimizers[role].zero_grad(set_to_none=True)
        gc.collect()
        self.clock.backend.empty_cache()


def time_steps(bench: Bench, least: dict[str, float], options: Options, console: Console) -> None:
    """Every mode in turn, then the table."""
    columns = {"floor": {key: passes * least[kind] for key, (passes, kind) in PARTS.items()}}
    for mode in options.remat.split(","):
        words = {"precision": "bfloat16", "compile": options.compile, "shard": 1, "remat": mode}
        hardware = Hardware.named(options.device, **words)
        try:
            columns[mode] = bench.measure(hardware, options.steps)
        except RuntimeError as error:
            if "out of memory" not in str(error):  # a library's own words are no torch.OutOfMemoryError
                raise
            console.print(f"remat={mode}: out of memory: {str(error)[:200]}")
        if mode in columns:
            console.print(f"remat={mode}: peak {bench.clock.gib('max_memory_allocated'):.1f} GiB")
        else:
            bench.forget()  # out here, where the error no longer holds the graph
    table = Table("loss", "seconds of", *columns)
    for key in PARTS:
        table.add_row(*key, *(f"{column[key]:.3f}" for column in columns.values()))
    table.add_section()
    for name, keys in SUMS.items():
        table.add_row("", name, *(f"{sum(column[key] for key in keys):.2f}" for column in columns.values()))
    console.print(table)


def main() -> None:
    """Build, time, print."""
    options = parse(Options, sys.argv[1:])
    device, row, console = torch.device(options.device), variant(options.variant), Console(width=120)
    size = latent_size(row, options.size, options.frames)
    grid = (size[0], size[1] // 2, size[2] // 2)
    name = "CPU" if device.type == "cpu" else torch.get_device_module(device).get_device_name()
    console.print(
        f"{row.name} {options.size} {options.frames} frames, bf16, {name}, torch {torch.__version__}"
    )
    if options.block:
        short = replace(row, network=row.network | {"layers": 1})
        network = random_network(short, device, torch.bfloat16)
        network.config["layers"] = row.network["layers"]
        time_block(network, grid, options.remat.split(","), options.steps, console)
        return
    network = random_network(row, device, torch.bfloat16)
    inputs = network_inputs(row, size, device)
    example = Example(inputs["x"], inputs["context"], inputs["condition"], inputs["clip"])
    least = floors(network.config, grid[0] * grid[1] * grid[2])
    time_steps(Bench(network, example), least, options, console)


if __name__ == "__main__":
    main()
