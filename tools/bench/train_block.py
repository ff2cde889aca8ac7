"""A clock and a floor for training, and one transformer block measured by them."""

import gc
import statistics
import time
from collections import defaultdict

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from distill.jvp import jvp
from distill.remat import rematerialize
from tools.bench.timing import BF16_RATE
from turbodiffusion.models.rope import rotary_table
from turbodiffusion.models.wan import WanModel

COST = {"forward": (1, 1), "tangent": (2, 3), "training": (3, 3.5)}  # of linear layers and attention
REST = "algebra, AdamW, average"


def floors(config: dict[str, int], tokens: int) -> dict[str, float]:
    """Seconds of a forward, of a tangent pass, and of a forward with its backward ("training")."""
    L, S, D, F, N = tokens, *(config[name] for name in ("text_length", "dim", "ffn_dim", "layers"))
    linear, attention = N * (4 * L * D * (3 * D + F) + 4 * S * D * D), N * 4 * L * D * (L + S)
    return {name: (a * linear + b * attention) / BF16_RATE for name, (a, b) in COST.items()}


class Clock:
    """Seconds between marks; it marks every pass of the networks that it follows."""

    def __init__(self, device: torch.device):
        self.device, self.backend = device, torch.get_device_module(device)
        self.seconds, self.last = defaultdict(list), time.perf_counter()

    def mark(self, part: str) -> None:
        """What ran since the last mark was `part`."""
        self.backend.synchronize()
        now = time.perf_counter()
        self.seconds[part].append(now - self.last)
        self.last = now

    def take(self) -> dict[str, list[float]]:
        """All that was marked since it was last taken."""
        seconds, self.seconds = self.seconds, defaultdict(list)
        return seconds

    def follow(self, network: nn.Module, role: str) -> None:
        """A pass without a graph is of its role; the student's a rollout or, with dual numbers, a tangent."""

        def after(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
            student = "rollout" if unpack_dual(inputs[0]).tangent is None else "tangent"
            without_graph = student if role == "student" else role
            self.mark("training" if torch.is_grad_enabled() else without_graph)

        network.register_forward_pre_hook(lambda *_: self.mark(REST))
        network.register_forward_hook(after)

    def gib(self, statistic: str = "memory_allocated") -> float:
        """Memory in use, or its peak "max_memory_allocated"; a CPU counts none."""
        return 0.0 if self.device.type == "cpu" else getattr(self.backend, statistic)(self.device) / 2**30

    def forget(self) -> None:
        """Drop networks that nothing needs, which their hooks hold, and the memory kept for them."""
        gc.collect()
        if self.device.type != "cpu":
            self.backend.empty_cache()

    def reset_peak(self) -> None:
        """Count the peak from here."""
        if self.device.type != "cpu":
            self.backend.reset_peak_memory_stats(self.device)


def time_block(
    network: WanModel, grid: tuple[int, int, int], modes: list[str], steps: int, console: Console
) -> None:
    """The first block's forward, tangent pass and training, then all blocks' by multiplication."""
    block, config = network.blocks[0].requires_grad_(True), network.config
    device, dtype = network.head.modulation.device, block.ffn[0].weight.dtype
    L, D, N = grid[0] * grid[1] * grid[2], config["dim"], config["layers"]
    x, dx, text = (torch.randn(1, n, D, device=device, dtype=dtype) for n in (L, L, config["text_length"]))
    signal, dsignal = (torch.randn(1, 1, 6, D, device=device) for _ in range(2))
    fixed = (rotary_table(grid, D // config["heads"], device), text, None)
    clock, kept, peak = Clock(device), {}, {}
    for _ in range(steps + 1):
        clock.mark("before")
        with torch.no_grad():
            block(x, signal, *fixed)
        clock.mark("forward")
        jvp(block, (x, signal), (dx, dsignal), *fixed)
        clock.mark("tangent")
    for mode in modes:
        rematerialize([block], mode)
        for _ in range(steps + 1):
            used = clock.gib()
            clock.reset_peak()
            out = block(x.requires_grad_(), signal, *fixed)
            kept[mode] = clock.gib() - used
            out.backward(dx)
            del out  # or the next would replace it and count for nothing
            peak[mode] = clock.gib("max_memory_allocated") - used
            clock.mark(mode)
    ms = {part: 1e3 * statistics.median(seen[1:]) for part, seen in clock.take().items()}
    least = {kind: seconds * 1e3 / N for kind, seconds in floors(config, L).items()}
    for kind in ("forward", "tangent"):
        console.print(f"{kind}: {ms[kind]:.1f} ms a block, floor {least[kind]:.1f}")
    floor = N * (2 * least["forward"] + least["tangent"] + 2 * least["training"]) / 1e3
    for mode in modes:
        step = N * (2 * ms["forward"] + ms["tangent"] + 2 * ms[mode]) / 1e3
        console.print(
            f"training, remat={mode}: {ms[mode]:.1f} ms a block, floor {least['training']:.1f}; it keeps "
            f"{kept[mode]:.2f} GiB, peak {peak[mode]:.2f}\n"
            f"  {N} blocks: {N} x (2 x {ms['forward']:.1f} + {ms['tangent']:.1f} + 2 x {ms[mode]:.1f}) ms = "
            f"{step:.1f} s a full step, floor {floor:.1f}; activations {N} x {kept[mode]:.2f} + "
            f"{peak[mode] - kept[mode]:.2f} = {(N - 1) * kept[mode] + peak[mode]:.1f} GiB"
        )
