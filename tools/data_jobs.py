"""The modes of make_data: what options each reads, and what its samples are."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from distill.shard_files import Keyed, Sample
from tools.options import MISSING, parse
from tools.video_clips import list_videos, read_clip
from turbodiffusion.checkpoints import load_image_encoder, load_vae, locate
from turbodiffusion.checkpoints.metadata import empty_module
from turbodiffusion.errors import UserError
from turbodiffusion.pipelines import options as inference
from turbodiffusion.pipelines.conditioning import prepare
from turbodiffusion.pipelines.found import Found, load, load_texts
from turbodiffusion.pipelines.generate import Clip, Encoded, Models, Pipeline, Watch
from turbodiffusion.pipelines.graphs import check_graph
from turbodiffusion.pipelines.memory import vae_chunk
from turbodiffusion.pipelines.offload import check_offload
from turbodiffusion.pipelines.prompts import Item, read_items
from turbodiffusion.pipelines.request import choose_task, pick_device, pick_dtype, resolve
from turbodiffusion.pipelines.sizes import Size, check_frames, check_size, parse_size
from turbodiffusion.pipelines.texts import cache_folder
from turbodiffusion.pipelines.video_io import read_picture
from turbodiffusion.variants import CONFIGS, Sampling

Mode = Enum("Mode", ["sample", "encode", "text", "negative"])
Format = Enum("Format", ["tar", "safetensors"])

MODELS = {"ckpt", "ckpt_low", "variant", "vae", "text_encoder", "tokenizer", "image_encoder"}
ALWAYS = MODELS | {"mode", "dst", "device", "dtype", "offload", "text_cache"}
SHARDED = {"format", "samples_per_shard", "batch"}
PICTURE = {"size", "aspect", "frames"}
SAMPLING = {"negative_prompt", "sampler", "steps", "guidance", "shift", "sigma_max", "boundary"}
SAMPLING |= {"attention", "ratio", "block_q", "block_k", "drop_linear", "graph", "compile"}
# what else each mode reads
READS = {
    Mode.sample: SHARDED | PICTURE | SAMPLING | {"prompt_file", "repeat", "seed"},
    Mode.encode: SHARDED | PICTURE | {"videos", "csv", "fps", "with_picture", "skip_broken"},
    Mode.text: SHARDED | {"prompt_file"},
    Mode.negative: {"negative_prompt"},
}


@dataclass
class Options(inference.Options):
    """Those of infer.py, and what only make_data has."""

    mode: Mode = MISSING
    dst: str = MISSING
    repeat: int = 1
    videos: str | None = None
    csv: str | None = None
    with_picture: bool | None = None  # whether real clips show their first frame; null: where they must
    skip_broken: bool = False
    format: Format = Format.tar
    samples_per_shard: int = 32
    batch: int = 1


def read(words: list[str]) -> Options:
    """The options, no "auto" left among how to run; UserError for what a mode does not read or can not be."""
    cfg = OmegaConf.load(CONFIGS / "infer.yaml")
    defaults = {field.name: cfg[field.name] for field in fields(inference.Options)}
    # shards hold the texts: those of a whole set would only fill the user's cache
    options = parse(Options(**{**defaults, "text_cache": "none"}), words)
    if options.ckpt is None and options.ckpt_low is None:  # a teacher, where infer.py takes its student
        options.ckpt = str(locate("network", "wan_tiny", Path.cwd()))
    given = {word.partition("=")[0] for word in words}
    if foreign := given - ALWAYS - READS[options.mode]:
        raise UserError(f"{min(foreign)}= means nothing to mode={options.mode.name}: leave it away")
    for name in ("repeat", "samples_per_shard", "batch", "fps"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise UserError(f"{name}={value}: it must be greater than 0")
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    if options.device == "auto" and device.type != "cpu":
        # of several processes on a host each takes its own
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
    graph = check_graph(options.graph, device, check_offload(options.offload), compiled=options.compile)
    settled = {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "graph": str(graph).lower()}
    return replace(options, **settled)


@dataclass(frozen=True)
class Job:
    """A set of samples, its options checked before any weight is read."""

    samples: int
    decided_by: dict[str, object]
    sampling: Sampling
    make: Callable[[Pipeline, range], list[Keyed]]  # the samples of these numbers that can be made


def teacher_clips(options: Options, found: Found) -> Job:
    """The teacher's clips, from noise of seed + number; the prompts repeat from the first on."""
    items = read_prompts(options)
    check_alike(items)
    first = {name: vars(items[0])[name] for name in ("prompt", "image", "last_image")}
    first = {name: str(value) for name, value in first.items() if value is not None}
    # the first stands for all: they are alike
    given = replace(options, prompt_file=None, out=options.dst, **first)
    request = resolve(given, found.variant, found.sampling, found.multiple())
    size = request.shots[0].size

    def make(pipeline: Pipeline, numbers: range) -> list[Keyed]:
        chosen = [items[number % len(items)] for number in numbers]
        clip = Clip(
            prompts=[item.prompt for item in chosen],
            size=size,
            frames=request.frames,
            image=pictures((item.image for item in chosen), size),
            last_image=pictures((item.last_image for item in chosen), size),
        )
        watch = Watch(pipeline.device)
        encoded = pipeline.encode(clip, watch)
        latents = pipeline.denoise(encoded, [options.seed + number for number in numbers], watch)
        return keyed(numbers, clip.prompts, encoded, latents)

    what = {"sampling": asdict(request.sampling), "size": str(size), "seed": options.seed}
    what |= {"attention": found.attention}
    return Job(options.repeat * len(items), {**what, "prompts": digest(items)}, request.sampling, make)


def real_clips(options: Options, found: Found) -> Job:
    """Real videos, with what the network is told of their first frame, and of the last if it takes one."""
    videos = list_videos(options.videos, options.csv)
    size = check_size(parse_size(options.size or found.sampling.size, options.aspect), found.multiple())
    frames, fps = check_frames(options.frames or found.sampling.frames), options.fps or found.sampling.fps
    tasks = found.variant.tasks
    has_image = "t2v" not in tasks if options.with_picture is None else options.with_picture
    has_last = has_image and "flf2v" in tasks
    choose_task(found.variant, has_image=has_image, has_last=has_last)

    def read(number: int) -> Tensor | None:
        try:
            return read_clip(videos[number][0], frames, fps, size)
        except UserError as error:
            if not options.skip_broken:
                raise UserError(f"{error}; or pass skip_broken=true to leave such videos out") from error
            warnings.warn(f"left out: {error}", stacklevel=2)
            return None

    def make(pipeline: Pipeline, numbers: range) -> list[Keyed]:
        clips = {number: clip for number in numbers if (clip := read(number)) is not None}
        if not clips:
            return []
        pixels = torch.stack(list(clips.values())).to(pipeline.device)
        clip = Clip(
            prompts=[videos[number][1] for number in clips],
            size=size,
            frames=frames,
            image=pixels[:, :, 0] if has_image else None,
            last_image=pixels[:, :, -1] if has_last else None,
        )
        encoded, vae = pipeline.encode(clip, Watch(pipeline.device)), pipeline.models.vae
        pipeline.residence.use(vae)
        latents = vae.encode(pixels, chunk=vae_chunk(vae, (len(clips), *encoded.shape), tiled=False))
        return keyed(clips, clip.prompts, encoded, latents)

    what = {"size": str(size), "frames": frames, "fps": fps, "with_picture": has_image}
    return Job(len(videos), {**what, "videos": digest(videos)}, found.sampling, make)


def texts(options: Options, found: Found) -> Job:
    """Prompts alone."""
    prompts = [item.prompt for item in read_prompts(options)]

    def make(pipeline: Pipeline, numbers: range) -> list[Keyed]:
        return [(f"{number:09d}", embed(pipeline, prompts[number])) for number in numbers]

    return Job(len(prompts), {"prompts": digest(prompts)}, found.sampling, make)


def read_prompts(options: Options) -> list[Item]:
    """Those of the prompt file."""
    if options.prompt_file is None:
        raise UserError("pass prompt_file=FILE, with a prompt a line")
    return read_items(Path(options.prompt_file).expanduser())


def check_alike(items: list[Item]) -> None:
    """Refuse prompts that can not be in one set, and pictures that are not there."""
    if any(item.seed is not None or item.negative_prompt is not None for item in items):
        raise UserError("seed and negative_prompt hold for all samples: take them out of prompt_file")
    if len({(item.image is None, item.last_image is None) for item in items}) > 1:
        raise UserError("all prompts of a set must be alike: give each its picture, or none")
    for file in (file for item in items for file in (item.image, item.last_image)):
        if file is not None and not file.is_file():
            raise UserError(f"the image {file} does not exist")


def pictures(files: Iterable[Path | None], size: Size) -> Tensor | None:
    """(B, 3, H, W) in [-1, 1]."""
    found = [prepare(read_picture(file), size) for file in files if file is not None]
    return torch.cat(found) if found else None


def embed(pipeline: Pipeline, prompt: str) -> Sample:
    """A prompt alone, whatever others there are: a batch is padded to its longest text."""
    return Sample(prompt, pipeline.context(prompt, Watch(pipeline.device))[0].bfloat16().cpu())


def keyed(numbers: Iterable[int], prompts: Sequence[str], encoded: Encoded, latents: Tensor) -> list[Keyed]:
    """What was made of a batch, sample by sample."""
    told = {name: getattr(encoded, name) for name in ("context", "condition", "clip")}
    made = {name: x for name, x in {"latents": latents, **told}.items() if x is not None}
    rows = {name: x.expand(len(prompts), *x.shape[1:]).bfloat16().cpu() for name, x in made.items()}
    samples = [Sample(prompt, **{name: x[i] for name, x in rows.items()}) for i, prompt in enumerate(prompts)]
    return [(f"{number:09d}", sample) for number, sample in zip(numbers, samples, strict=True)]


def digest(items: list[object]) -> str:
    """Changes with the items and their order."""
    return hashlib.sha256(repr(items).encode()).hexdigest()


def build(options: Options, found: Found, sampling: Sampling) -> Pipeline:
    """The models; the network only where it is to sample."""
    device, offload = torch.device(options.device), check_offload(options.offload)
    home = device if offload == "none" else torch.device("cpu")
    take = load if options.mode is Mode.sample else load_encoders
    dtype, texts = pick_dtype(options.dtype, device), cache_folder(options.text_cache)
    models = take(found, device=home, dtype=dtype, text_cache=texts)
    ways = {"offload": offload, "graph": options.graph == "true", "compile": options.compile}
    return Pipeline(models, sampling, device=device, **ways)


def load_encoders(
    found: Found, *, device: torch.device, dtype: torch.dtype, text_cache: Path | None
) -> Models:
    """All models but the network, which is there in shape only and takes no memory."""
    reports, where = found.reports, {"device": device, "dtype": dtype}
    clip = reports.get("image_encoder")
    return Models(
        network=empty_module(reports["network"]),
        vae=load_vae(reports["vae"].path, **where),
        text_encoder=load_texts(found, **where, text_cache=text_cache),
        image_encoder=clip and load_image_encoder(clip.path, **where),
    )
