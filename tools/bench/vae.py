"""Time of encoding and decoding a clip on one GPU, plain and fused, real size, random weights, bf16.

    python -m tools.bench.vae size=832x480,1280x720 chunks=1,auto profile=true

Forms take turns; plain ones run what a CPU runs, and `auto` chunks are those a pipeline takes of this GPU.
A gate comes first: on a small clip the fused form must be the plain one in fp32, to 1e-3 of it, and may
not lose more to bf16.  Peaks are over weights and input.  profile=true adds which kernels took the time.
"""

import statistics
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
import yaml
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from kernels.selftest import unfused
from tools.bench.forward import randomize
from tools.bench.timing import gpu_console, measure
from tools.options import parse
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.pipelines.generate import CHUNK_BYTES, latent_shape, vae_chunk
from turbodiffusion.pipelines.memory import GIB, free_memory
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.variants import CONFIGS

# bf16 that an H200 multiplies and adds
RATE = 790e12
# how much more the fused form may lose to bf16 than the plain one; it rounds less often
SLACK = 1.1
SHOWN = 25


@dataclass
class Options:
    """The command line."""

    vae: str = "wan2.1"
    size: str = "832x480,1280x720"
    frames: int = 81
    chunks: str = "1,auto"
    repeats: int = 5
    cudnn_benchmark: bool = False
    profile: bool = False


def random_vae(name: str, device: torch.device) -> VideoVAE:
    """An autoencoder of configs/vae with random weights in bf16."""
    sizes = yaml.safe_load((CONFIGS / "vae" / f"{name}.yaml").read_text())
    sizes.pop("_target_")
    with torch.device("meta"):
        vae = VideoVAE(**sizes)
    randomize(vae, device, lambda name: torch.bfloat16)
    return vae.to(device)


@torch.no_grad()
def gate(vae: VideoVAE, device: torch.device) -> dict[str, tuple[float, float, float]]:
    """Relative errors by direction: fused of plain in fp32, and in bf16 plain's and fused's of fp32."""
    z, *latents = latent_shape(vae, 9, Size(8 * vae.spatial_factor, 6 * vae.spatial_factor))
    clip = torch.rand(1, 3, 9, 6 * vae.spatial_factor, 8 * vae.spatial_factor, device=device) * 2 - 1
    inputs = {"encode": clip, "decode": torch.randn(1, z, *latents, device=device)}
    whole, errors = deepcopy(vae).float(), {}
    for name, x in inputs.items():
        runs = [partial(getattr(model, name), x, chunk=2) for model in (whole, vae)]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            (truth, fused32), (plain, fused) = ((as_plain(run), run()) for run in runs)
        exact, lost, kept = ((y - truth).norm().item() / truth.norm().item() for y in (fused32, plain, fused))
        errors[name] = exact, lost, kept
        if not (exact <= 1e-3 and kept <= SLACK * lost):
            raise SystemExit(f"{name}: fused is off by {exact:.1e} in fp32, {kept:.1e} in bf16: not timed")
    return errors


def as_plain(run: Callable[[], Tensor]) -> Tensor:
    """What a run makes without kernels."""
    with unfused():
        return run()


def chunk_of(word: str, vae: VideoVAE, latents: tuple[int, ...]) -> int:
    """The latent frames that a word of chunks= stands for."""
    if word != "auto":
        return int(word)
    spare = max(CHUNK_BYTES, (free_memory(vae.conv2.weight.device).device or 0) // 2)
    return vae_chunk(vae, (1, *latents), tiled=False, spare=spare)


def report(
    name: str, vae: VideoVAE, x: Tensor, chunks: list[int], options: Options, console: Console
) -> None:
    """Time one direction in all forms and print; the first is the yardstick."""
    run = partial(getattr(vae, name), x)
    runs = {f"plain, {chunk} at a time": partial(as_plain, partial(run, chunk=chunk)) for chunk in chunks}
    runs |= {f"fused, {chunk} at a time": partial(run, chunk=chunk) for chunk in chunks}
    peaks, made = {}, {}
    for label, fn in runs.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made[label] = fn().cpu()
        peaks[label] = (torch.cuda.max_memory_allocated() - before) / GIB
    flop = count(name, vae, x)
    console.print(f" {name}: {flop / 1e12:.0f} TFLOP, {flop / RATE:.2f} s at {RATE / 1e12:.0f} TFLOP/s")
    wanted, yardstick = next(iter(made.values())), None
    for label, spent in measure(runs, options.repeats).items():
        low, ms, high = (pick(spent) for pick in (min, statistics.median, max))
        yardstick = yardstick or ms
        off = ((made[label] - wanted).norm() / wanted.norm()).item()
        console.print(
            f"  {label}: {ms / 1e3:.3f} s ({low / 1e3:.3f} to {high / 1e3:.3f}), {yardstick / ms:.2f} x, "
            f"peak {peaks[label]:.1f} GiB, {off:.1e} from the first"
        )
    if options.profile:
        show_profile(runs[label], console)


def count(name: str, vae: VideoVAE, x: Tensor) -> int:
    """Floating-point operations of one direction."""
    with FlopCounterMode(display=False) as counter:
        getattr(deepcopy(vae).to("meta"), name)(x.to("meta"), chunk=None)
    return counter.get_total_flops()


def show_profile(run: Callable[[], Tensor], console: Console) -> None:
    """Kernels of one run, and convolutions by shape, the longest first."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as recorded:
        run()
        torch.cuda.synchronize()
    kernels = [e for e in recorded.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(e.self_device_time_total for e in kernels)
    console.print(f"  kernels: {total / 1e3:.0f} ms")
    for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:SHOWN]:
        console.print(
            f"   {e.self_device_time_total / 1e3:8.1f} ms {e.count:5d} x {e.key[:95]}", markup=False
        )
    rows = recorded.key_averages(group_by_input_shape=True)
    convolutions = [e for e in rows if e.key in ("aten::cudnn_convolution", "aten::slow_conv3d")]
    for e in sorted(convolutions, key=lambda e: -e.device_time_total)[:SHOWN]:
        rate = flop_of(e.input_shapes) * e.count / e.device_time_total / 1e6
        console.print(
            f"   {e.device_time_total / 1e3:8.1f} ms {e.count:5d} x {e.key} of {e.input_shapes[:2]}, "
            f"{rate:.0f} TFLOP/s if of stride 1", markup=False,
        )  # fmt: skip


def flop_of(shapes: list[list[int]]) -> int:
    """Of a convolution with input (N, C, [T,] H, W) and weight, padded in height and width alone."""
    (n, _, *size), (out, *kernel) = shapes[:2]
    frames = size[0] - kernel[1] + 1 if len(size) == 3 else 1
    return 2 * n * frames * size[-2] * size[-1] * out * torch.Size(kernel).numel()


@torch.no_grad()
def main() -> None:
    """Gate, time, print."""
    options = parse(Options, sys.argv[1:])
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    said = f"cuDNN {torch.backends.cudnn.version()}, benchmark {options.cudnn_benchmark}"
    console = gpu_console(f"{said}, {options.vae}, {options.frames} frames")
    device = torch.device("cuda")
    vae = random_vae(options.vae, device)
    for name, (exact, lost, kept) in gate(vae, device).items():
        console.print(f"{name}: {exact:.1e} in fp32; of fp32 in bf16 plain {lost:.2e}, fused {kept:.2e}")
    for words in options.size.split(","):
        size = Size(*map(int, words.split("x")))
        z, *latents = latent_shape(vae, options.frames, size)
        chunks = sorted({chunk_of(word, vae, (z, *latents)) for word in options.chunks.split(",")})
        console.print(words)
        clip = torch.rand(1, 3, options.frames, size.height, size.width, device=device) * 2 - 1
        for name, x in (("decode", torch.randn(1, z, *latents, device=device)), ("encode", clip)):
            report(name, vae, x, chunks, options, console)


if __name__ == "__main__":
    main()
