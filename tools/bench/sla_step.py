"""Time and memory of a step of SLA finetuning at real size, random weights, as distill/trainer.py takes it.

    python -m tools.bench.sla_step variant=wan2.1_t2v_1.3b remat=block,keep_attention [compile=true]

Timed: all that experiment=sla_wan1_3b does in a step on one clip, but data, files and log; medians over
`steps` after two of warm-up.
"""

import statistics
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console

from distill.conditioning import Example
from distill.objective import Parts
from distill.recipes import Hardware
from distill.trainer import Plan, Trainer
from tools.bench.forward import latent_size, network_inputs, random_network
from tools.options import parse
from turbodiffusion.models.wan import WanModel
from turbodiffusion.variants import CONFIGS, variant


@dataclass
class Options:
    """The command line."""

    variant: str = "wan2.1_t2v_1.3b"
    size: str = "832x480"
    frames: int = 81
    ratio: float = 0.1
    block_q: int = 128
    block_k: int = 64
    remat: str = "block,keep_attention"
    steps: int = 3
    compile: bool = False
    device: str = "cuda"


@dataclass(frozen=True)
class OneClip:
    """The same example in every batch."""

    example: Example

    def batch(self, number: int) -> Example:
        return self.example


def trainer(network: WanModel, example: Example, options: Options, hardware: Hardware) -> Trainer:
    """Of a student that begins as the network, towards the network."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", ["experiment=sla_wan1_3b"])
    student = deepcopy(network)
    blocks = {"block_q": options.block_q, "block_k": options.block_k}
    student.set_attention({"name": "sla", "ratio": options.ratio, **blocks})
    student.requires_grad_(True)
    for each in (network, student):
        hardware.prepare(each, WanModel.is_fp32, each.shard_units())
    objective = instantiate(config.recipe.objective).build(student, network, None, None)
    plan, folder = Plan(steps=options.steps + 3, log_every=1000), Path(tempfile.mkdtemp())
    optims = {"default": instantiate(config.optims.default)}
    # what a run makes at its end is not reached
    return Trainer(Parts(objective, OneClip(example), None), optims=optims, plan=plan, folder=folder)


def time_steps(trainer: Trainer, device: torch.device, steps: int) -> tuple[float, float]:
    """Median seconds of a step, and the peak of memory in GiB (0 on a CPU, which counts none)."""
    backend, seconds = torch.get_device_module(device), []
    for i in range(steps + 2):
        if i == 2 and device.type != "cpu":
            backend.reset_peak_memory_stats()
        started = time.perf_counter()
        trainer.update()
        backend.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = 0.0 if device.type == "cpu" else backend.max_memory_allocated() / 2**30
    return statistics.median(seconds[2:]), peak


def main() -> None:
    """Build anew for every mode, time, print."""
    options = parse(Options, sys.argv[1:])
    device, row, console = torch.device(options.device), variant(options.variant), Console(width=130)
    inputs = network_inputs(row, latent_size(row, options.size, options.frames), device)
    example = Example(inputs["x"], inputs["context"], inputs["condition"], inputs["clip"])
    name = "CPU" if device.type == "cpu" else torch.get_device_module(device).get_device_name()
    console.print(
        f"{row.name} {options.size} {options.frames} frames, bf16, ratio {options.ratio}, blocks of "
        f"{options.block_q} queries and {options.block_k} keys, {name}, torch {torch.__version__}"
    )
    for mode in options.remat.split(","):
        words = {"precision": "bfloat16", "compile": options.compile, "shard": 1, "remat": mode}
        network = random_network(row, device, torch.bfloat16)
        made = trainer(network, example, options, Hardware.named(options.device, **words))
        seconds, peak = time_steps(made, device, options.steps)
        console.print(f"  remat={mode}: {seconds:.2f} s a step, peak {peak:.1f} GiB")
        del made, network


if __name__ == "__main__":
    main()
