"""Generations at real size with random weights, on which time does not depend, and the forwards within."""

import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import yaml

from kernels.selftest import unfused
from tools.bench import forward
from tools.bench.vae import random_vae
from turbodiffusion.errors import UserError
from turbodiffusion.models.int8 import to_eight_bits
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.tokenizers import ByteTokenizer
from turbodiffusion.models.wan import WanModel
from turbodiffusion.pipelines.generate import Clip, Models, Pipeline
from turbodiffusion.pipelines.graphs import check_graph
from turbodiffusion.pipelines.memory import GIB
from turbodiffusion.pipelines.offload import check_offload
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.pipelines.video_io import beside, growing_video
from turbodiffusion.pipelines.watch import Watch
from turbodiffusion.variants import CONFIGS, Variant, variant

PROMPT = "an octopus drifts left across a teal background, " * 4
# where students begin; nothing depends on it here
SIGMA_MAX = 80.0
# forwards of the original: 50 steps, each with and without the prompt
FORWARDS = 100


@dataclass
class Options(forward.Network):
    """The command line."""

    steps: int = 4
    guided: bool = False
    attention: str = "sla_int8"
    quant: str = "int8"
    graph: str = "auto"
    offload: str = "none"
    cap: float | None = None
    repeats: int = 3
    compare: bool = True
    compile: bool = True
    dst: str | None = None
    kernels: bool = False


@dataclass(frozen=True)
class Way:
    """A way to run the network's forwards."""

    label: str
    attention: str = "dense"
    quant: str = "none"
    is_fused: bool = False


@dataclass
class Measured:
    """Seconds: of a forward by its way, dense ones of FORWARDS first; of each stage; and peak bytes."""

    dense: dict[str, float] = field(default_factory=dict)
    forwards: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    peak: int = 0


def ways(options: Options) -> list[Way]:
    """Dense and eager first, then what the options turn on, one after another."""
    found = [Way("dense")]

    def add(label: str, **changes: str | bool) -> None:
        way = replace(found[-1], **changes)
        if way != found[-1]:
            found.append(replace(way, label=label))

    add("sparse-linear attention", attention="dense" if options.attention == "dense" else "sla")
    add("fused norms", is_fused=True)
    add(f"linear layers in {options.quant}", quant=options.quant)
    add("attention in 8 bits", attention=options.attention)
    return found


def random_models(row: Variant, device: torch.device) -> Models:
    """All of a variant that makes videos from text, in bf16."""
    sizes = yaml.safe_load((CONFIGS / "text_encoder" / f"{row.text_encoder}.yaml").read_text())
    sizes = {name: value for name, value in sizes.items() if name not in ("_target_", "tokenizer")}
    with torch.device("meta"):
        text_encoder = TextEncoder(tokenizer=ByteTokenizer(), **sizes)
    forward.randomize(text_encoder, device, lambda name: torch.bfloat16)
    networks = [forward.random_network(row, device, torch.bfloat16) for _ in range(1 + row.experts)]
    return Models(
        network=networks[0],
        network_low=networks[1] if row.experts else None,
        vae=random_vae(row.vae, device),
        text_encoder=text_encoder.to(device),
    )


def change(models: Models, way: Way, options: Options) -> None:
    """Have the networks run that way; what is in 8 bits stays so."""
    for network in (models.network, models.network_low):
        if network is not None:
            forward.attend(network, way.attention, options, options.ratio)
            if way.quant != "none" and network.blocks[0].ffn[0].weight.is_floating_point():
                to_eight_bits(network, quant=way.quant)


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median, after one of warm-up."""
    spent = []
    for _ in range(repeats + 1):
        start = perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        spent.append(perf_counter() - start)
    return statistics.median(spent[1:])


def compiled(network: WanModel) -> WanModel:
    """Another of the same weights, whose blocks run as torch.compile makes them."""
    other = forward.twin(network)
    for block in other.shard_units():
        block.compile(dynamic=False)
    return other


@torch.no_grad()
def compare(models: Models, row: Variant, options: Options, result: Measured) -> None:
    """Time a forward in every way, which leaves the networks as the options ask."""
    device = torch.device(options.device)
    inputs = forward.network_inputs(row, forward.latent_size(row, options.size, options.frames), device)
    # of attention alone: in 8 bits other errors are those of the quantised network
    forward.gate(models.network, row, ["dense", options.attention], options)
    time = partial(seconds, device=device, repeats=options.repeats)
    for way in ways(options):
        change(models, way, options)
        with nullcontext() if way.is_fused else unfused():
            result.forwards[way.label] = time(partial(models.network, **inputs))
        if way.label == "dense":
            result.dense["eager"] = result.forwards[way.label]
            if options.compile:
                with unfused():
                    result.dense["blocks compiled"] = time(partial(compiled(models.network), **inputs))


def build(models: Models, row: Variant, options: Options) -> Pipeline:
    """What makes videos as the options say."""
    device, offload = torch.device(options.device), check_offload(options.offload)
    if offload != "none":
        for model in filter(None, vars(models).values()):
            model.to("cpu")
    sampling = row.sampling if options.guided else row.sampling.as_student(SIGMA_MAX)
    sampling = replace(sampling, steps=options.steps)
    graph = check_graph(options.graph, device, offload)
    return Pipeline(models, sampling, device=device, offload=offload, graph=graph)


def generate(models: Models, row: Variant, options: Options, result: Measured) -> None:
    """Text to file: a first clip, which compiles and chooses, then medians of the repeats."""
    pipeline, device = build(models, row, options), torch.device(options.device)
    size = Size(*map(int, options.size.split("x")))
    # texts are new to whatever remembers them
    clips = [
        Clip(prompts=[f"{PROMPT}{i}"], size=size, frames=options.frames) for i in range(options.repeats + 1)
    ]
    backend = torch.get_device_module(device)
    if device.type != "cpu":
        backend.empty_cache()
        backend.reset_peak_memory_stats(device)
    if options.cap is not None:
        # from here on: making the weights is not part of a run
        whole = backend.get_device_properties(device).total_memory
        index = backend.current_device() if device.index is None else device.index
        backend.set_per_process_memory_fraction(min(1.0, options.cap * GIB / whole), index)
    result.first, *runs = (make(pipeline, clip) for clip in clips)
    result.stages = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    result.peak = 0 if device.type == "cpu" else backend.max_memory_allocated(device)


def make(pipeline: Pipeline, clip: Clip) -> dict[str, float]:
    """Seconds of the stages of one video; of writing, what is left when the last frame is decoded."""
    watch = Watch(pipeline.device)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as writing:
        noise = pipeline.noise(clip, [0])
        latents = pipeline.denoise(pipeline.encode(clip, watch), [0], watch, noise)
        video = growing_video(Path(folder) / "clip.mp4", fps=pipeline.sampling.fps, crf=18)
        take = writing.enter_context(beside(writing.enter_context(video)))
        frames = pipeline.decode(latents, watch, lambda piece: take(piece[0]))
        pipeline.residence.release()
        with watch.stage("write"):
            writing.close()
    if not frames.isfinite().all():
        raise SystemExit("the frames are not finite: not a time to quote")
    return watch.seconds


def measure(options: Options) -> Measured:
    """Everything, on one set of weights."""
    row, result = variant(options.variant), Measured()
    if "t2v" not in row.tasks:
        raise UserError(
            f"variant={row.name} does not make videos from text alone, which is what is timed here"
        )
    if options.cap is not None and not options.device.startswith("cuda"):
        raise UserError(f"cap= limits the memory of a CUDA device, and this is {options.device}")
    models = random_models(row, torch.device(options.device))
    if options.compare:
        compare(models, row, options, result)
    change(models, ways(options)[-1], options)
    generate(models, row, options, result)
    return result
