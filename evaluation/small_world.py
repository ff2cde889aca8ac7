"""What a small-world model generates, judged by the oracle on prompts that training never saw.

    python -m evaluation.small_world count=512                 text to video, held-out combinations
    python -m evaluation.small_world count=128 image=true      from the first frame and the caption

These figures are about the small world and nothing else.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from evaluation.command import run
from evaluation.oracle import Oracle, Reading, accuracy
from turbodiffusion.checkpoints import load_network, load_text_encoder, load_vae
from turbodiffusion.pipelines.generate import Clip, Models, Pipeline
from turbodiffusion.pipelines.schedule import choose_sampler
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.small_world.captions import Prompt, held_out_prompts
from turbodiffusion.small_world.clips import draw_scenes, render
from turbodiffusion.small_world.sprites import Sprites, load_sprites
from turbodiffusion.variants import Sampling

ATTRIBUTES = ("subject", "motion", "background")


@dataclass
class Setting:
    """What every score of the small world's models rests on; sample j has seed + j."""

    vae: str = "assets/vae_tiny.safetensors"
    text_encoder: str = "assets/text_tiny.safetensors"
    count: int = 512
    split: str = "held_out_combinations"
    batch: int = 32
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str = "bfloat16"
    quant: str = "auto"  # none, int8, fp8, or auto: what a network's file says


@dataclass
class Options(Setting):
    """The command line."""

    ckpt: str = "assets/wan_tiny.safetensors"
    image: bool = False
    steps: int | None = None
    guidance: float | None = None
    sampler: str = "auto"
    sheet: str | None = None  # a PNG of the first clips


def load_models(setting: Setting, ckpt: str) -> tuple[Models, Sampling]:
    """A network with the setting's VAE and text encoder, and how it wants to be sampled."""
    device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
    loaded = load_network(ckpt, device=device, dtype=dtype, quant=setting.quant)
    models = Models(
        network=loaded.network,
        vae=load_vae(setting.vae, device=device, dtype=dtype),
        text_encoder=load_text_encoder(setting.text_encoder, device=device, dtype=dtype),
    )
    return models, loaded.sampling


def load_pipeline(options: Options) -> Pipeline:
    """The models named on the command line, with their sampling defaults overridden by it."""
    models, sampling = load_models(options, options.ckpt)
    sampling = choose_sampler(sampling, options.sampler, "i2v" if options.image else "t2v")
    given = {name: x for name in ("steps", "guidance") if (x := getattr(options, name)) is not None}
    return Pipeline(models, replace(sampling, **given), device=torch.device(options.device))


def wanted(prompts: list[Prompt]) -> Tensor:
    """What prompts ask for, (B, 3) int64: subject, motion, background."""
    return torch.tensor([[getattr(prompt, name) for name in ATTRIBUTES] for prompt in prompts])


def first_frames(prompts: list[Prompt], sprites: Sprites, seed: int) -> Tensor:
    """First frames (B, 3, 128, 128) of rendered clips that show what the prompts say."""
    scenes = draw_scenes(len(prompts), torch.Generator().manual_seed(seed))
    scenes.subject, scenes.motion, scenes.background = wanted(prompts).T
    return render(scenes, sprites)[:, :, 0]


def clip_of(prompts: list[Prompt], sampling: Sampling, image: Tensor | None = None) -> Clip:
    """What to make of prompts, as the checkpoint wants its clips."""
    size = Size(*map(int, sampling.size.split("x")))
    return Clip(prompts=[prompt.text for prompt in prompts], size=size, frames=sampling.frames, image=image)


def generate(
    pipeline: Pipeline, prompts: list[Prompt], sprites: Sprites, options: Options
) -> Iterator[Tensor]:
    """Batches of clips (B, 3, 33, 128, 128), sample j with seed + j."""
    for start in track(range(0, len(prompts), options.batch), "generating"):
        part = prompts[start : start + options.batch]
        seeds = [options.seed + start + i for i in range(len(part))]
        image = first_frames(part, sprites, options.seed + start) if options.image else None
        yield pipeline(clip_of(part, pipeline.sampling, image), seeds).frames


def contact_sheet(clips: Tensor, path: Path, columns: int = 9) -> None:
    """Write a PNG with one clip a row, `columns` of its frames."""
    index = torch.linspace(0, clips.shape[2] - 1, columns).round().long()
    pixels = ((clips[:, :, index].clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    b, c, f, h, w = pixels.shape
    Image.fromarray(pixels.permute(0, 3, 2, 4, 1).reshape(b * h, f * w, c).numpy()).save(path)


def report(options: Options) -> None:
    """Generate the clips, read them, and print the table."""
    pipeline = load_pipeline(options)
    sprites = load_sprites().to(options.device)
    oracle, prompts = Oracle(sprites), held_out_prompts(options.count, options.split)
    readings: list[Reading] = []
    for i, clips in enumerate(generate(pipeline, prompts, sprites, options)):
        if i == 0 and options.sheet is not None:
            contact_sheet(clips[:12], Path(options.sheet))
        readings += oracle.read(clips)
    sampling = pipeline.sampling
    table = Table(
        title=f"{options.ckpt}: {options.count} prompts, {options.split}, image={options.image}, "
        f"{sampling.sampler}, {sampling.steps} steps, guidance {sampling.guidance:g}"
    )
    table.add_column("attribute")
    table.add_column("accuracy", justify="right")
    for name, value in asdict(accuracy(readings, wanted(prompts))).items():
        table.add_row(name.replace("_", " "), f"{100 * value:.1f} %")
    Console(width=120).print(table)


if __name__ == "__main__":
    run(Options, report)
