"""The options of make_data, which of them a mode reads, and the machine they name."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import Enum

import torch
from omegaconf import OmegaConf

from tools.options import MISSING
from turbodiffusion.errors import UserError
from turbodiffusion.pipelines import options as inference
from turbodiffusion.pipelines.found import Found
from turbodiffusion.pipelines.generate import Models, Pipeline
from turbodiffusion.pipelines.offload import Offload, check_offload
from turbodiffusion.pipelines.request import pick_device, pick_dtype
from turbodiffusion.variants import CONFIGS, Sampling

Mode = Enum("Mode", ["sample", "encode", "text", "negative"])
Format = Enum("Format", ["tar", "safetensors"])

MODELS = {"ckpt", "ckpt_low", "variant", "vae", "text_encoder", "tokenizer", "image_encoder"}
ALWAYS = {"mode", "dst", *MODELS, "device", "dtype", "offload"}
SHARDED = {"format", "samples_per_shard", "batch"}
PROMPTS = {"prompt_file", "count", "seed"}
PICTURE = {"size", "aspect", "frames"}
# what else each mode reads
READS = {
    Mode.sample: SHARDED
    | PROMPTS
    | PICTURE
    | {"repeat", "negative_prompt", "sampler", "steps", "guidance", "shift", "sigma_max", "boundary"},
    Mode.encode: SHARDED | PICTURE | {"videos", "csv", "fps", "with_picture", "skip_broken"},
    Mode.text: SHARDED | PROMPTS,
    Mode.negative: {"negative_prompt"},
}


@dataclass
class Options:
    """Those named as in infer.py mean the same.

    count: prompts that are used; the small world invents them, unless there is a prompt_file.
    with_picture: whether real clips are stored with what a network is told of their first frame (and of the
    last, where the model takes it); null: where it must be told.
    """

    mode: Mode = MISSING
    dst: str = MISSING
    ckpt: str | None = None
    ckpt_low: str | None = None
    variant: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    image_encoder: str | None = None
    prompt_file: str | None = None
    count: int | None = None
    repeat: int = 1
    negative_prompt: str | None = None
    videos: str | None = None
    csv: str | None = None
    with_picture: bool | None = None
    skip_broken: bool = False
    size: str | None = None
    aspect: str = "16:9"
    frames: int | None = None
    fps: float | None = None
    sampler: str = "auto"
    steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    sigma_max: float | None = None
    boundary: float | None = None
    seed: int = 0
    format: Format = Format.tar
    samples_per_shard: int = 256
    batch: int = 1
    device: str = "auto"
    dtype: str = "auto"
    offload: str = "none"


def infer_options(options: Options) -> inference.Options:
    """The same for the pipelines: infer.py's defaults, and what both have."""
    cfg = OmegaConf.load(CONFIGS / "infer.yaml")
    del cfg["defaults"], cfg["hydra"]
    theirs = {field.name for field in fields(inference.Options)} - {"prompt_file"}
    shared = {name: value for name, value in vars(options).items() if name in theirs}
    return replace(inference.read(cfg), **shared, out=options.dst)


def check(options: Options) -> None:
    """Refuse what the mode does not read, and numbers that can not be."""
    mode = options.mode
    for field in fields(options):
        if getattr(options, field.name) != field.default and field.name not in ALWAYS | READS[mode]:
            raise UserError(f"{field.name}= means nothing to mode={mode.name}: leave it away")
    for name in ("count", "repeat", "samples_per_shard", "batch", "fps"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise UserError(f"{name}={value}: it must be greater than 0")


@dataclass(frozen=True)
class Machine:
    """Where models run."""

    device: torch.device
    dtype: torch.dtype
    offload: Offload

    @classmethod
    def of(cls, options: Options) -> "Machine":
        """The options' machine; of several processes on a host each takes its own device."""
        device, local = pick_device(options.device), os.environ.get("LOCAL_RANK")
        if options.device == "auto" and local is not None and device.type != "cpu":
            device = torch.device(device.type, int(local))
        return cls(device, pick_dtype(options.dtype, device), check_offload(options.offload))

    def pipeline(self, load: Callable[..., Models], found: Found, sampling: Sampling) -> Pipeline:
        """The models that `load` takes of those found."""
        home = self.device if self.offload == "none" else torch.device("cpu")
        models = load(found, device=home, dtype=self.dtype)
        return Pipeline(models, sampling, device=self.device, offload=self.offload)
