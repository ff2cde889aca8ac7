"""Time of encoding and decoding a clip on one GPU, plain and fused, real size, random weights, bf16.

    python -m tools.bench.vae size=832x480,1280x720 chunks=1,auto

Forms take turns; plain ones run what a CPU runs, and `auto` chunks are those a pipeline takes of this GPU.
A gate comes first: on a small clip the fused form must be the plain one in fp32, to 1e-3 of it, and may
not lose more to bf16.  At full size every form must be near the first.  Which kernels take the time says
`python -m tools.bench.profile`.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels.selftest import unfused
from tools.bench.forward import randomize
from tools.bench.timing import Run, Tables, Timing, share_of, sizes, start
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.pipelines.generate import latent_shape
from turbodiffusion.pipelines.memory import free_memory, vae_chunk
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.variants import CONFIGS

# how much more the fused form may lose to bf16 than the plain one; it rounds less often
SLACK = 1.1
# of what bf16 makes, twice what it loses of random weights
ALLOWED = 4e-2


@dataclass
class Options(Timing):
    """The command line."""

    vae: str = "wan2.1"
    size: str = "832x480,1280x720"
    frames: int = 81
    chunks: str = "1,auto"
    calls: int = 1


def random_vae(name: str, device: torch.device) -> VideoVAE:
    """An autoencoder of configs/vae with random weights in bf16."""
    sizes = yaml.safe_load((CONFIGS / "vae" / f"{name}.yaml").read_text())
    sizes.pop("_target_")
    with torch.device("meta"):
        vae = VideoVAE(**sizes)
    randomize(vae, device, lambda name: torch.bfloat16)
    return vae.to(device)


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
    free = free_memory(vae.conv2.weight.device).device
    return vae_chunk(vae, (1, *latents), tiled=False, free=free)


def runs(name: str, vae: VideoVAE, x: Tensor, chunks: list[int]) -> dict[str, Run]:
    """One direction in all forms, plain ones first."""
    run = partial(getattr(vae, name), x)
    calls = {f"plain, {chunk} at a time": partial(as_plain, partial(run, chunk=chunk)) for chunk in chunks}
    calls |= {f"fused, {chunk} at a time": partial(run, chunk=chunk) for chunk in chunks}
    with FlopCounterMode(display=False) as counter:
        getattr(deepcopy(vae).to("meta"), name)(x.to("meta"), chunk=None)
    share = share_of((next(iter(calls.values()))(),), ALLOWED)
    return {label: Run(call, counter.get_total_flops(), share=share) for label, call in calls.items()}


def tables(options: Options) -> Tables:
    """Both directions at every size."""
    print(f"cuDNN {torch.backends.cudnn.version()}")
    device = torch.device("cuda")
    vae = random_vae(options.vae, device)
    for name, (exact, lost, kept) in gate(vae, device).items():
        print(f"{name}: {exact:.1e} in fp32; of fp32 in bf16 plain {lost:.2e}, fused {kept:.2e}")
    for width, height in sizes(options.size):
        z, *latents = latent_shape(vae, options.frames, Size(width, height))
        chunks = sorted({chunk_of(word, vae, (z, *latents)) for word in options.chunks.split(",")})
        clip = torch.rand(1, 3, options.frames, height, width, device=device) * 2 - 1
        for name, x in (("decode", torch.randn(1, z, *latents, device=device)), ("encode", clip)):
            yield f"{name}, {width}x{height}", runs(name, vae, x, chunks)


main = partial(start, Options, tables)

if __name__ == "__main__":
    main()
