"""The table of models: one file of `configs/model` each, the only place that states sizes and defaults."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import yaml

from turbodiffusion.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# the fixed negative prompt of the Wan models; it is part of what their guidance was tuned with
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class Sampling:
    """How a checkpoint wants to be sampled; it travels in the checkpoint's metadata."""

    steps: int
    shift: float
    guidance: float  # 1 means one forward a step and no negative prompt
    fps: int
    frames: int
    size: str  # WIDTHxHEIGHT in pixels
    sampler: str = "unipc"  # unipc, euler, dpmpp (teachers) or rcm (students)
    guidance_low: float | None = None  # of the low-noise expert
    boundary: float | None = None  # rectified-flow time below which the low-noise expert takes over
    sigma_max: float | None = None  # where a student's chain starts
    timesteps: str = "truncate"  # how 1000 s reaches the network: float, truncate (to whole) or bfloat16
    negative_prompt: str = WAN_NEGATIVE_PROMPT

    @property
    def student(self) -> bool:
        """Whether the weights are a few-step student's."""
        return self.sampler == "rcm"

    def as_student(self, sigma_max: float, timesteps: str = "bfloat16") -> "Sampling":
        """The defaults of an rCM student of this teacher: 4 steps, guidance distilled in.

        timesteps is the rule it was trained with; that of the published students rounds to bf16.
        """
        low = None if self.guidance_low is None else 1.0
        distilled = {"sampler": "rcm", "steps": 4, "guidance": 1.0, "guidance_low": low}
        return replace(self, **distilled, sigma_max=sigma_max, timesteps=timesteps)


@dataclass(frozen=True)
class Variant:
    """One row of the table.  `network` holds WanModel's arguments; `experts`: there are two of them."""

    name: str
    tasks: tuple[str, ...]  # of t2v, i2v, flf2v, ti2v
    network: dict[str, int]
    sampling: Sampling
    vae: str
    text_encoder: str
    experts: bool


@cache
def variants() -> dict[str, Variant]:
    """Every variant by name, in the order of the file names."""
    return {path.stem: _read(path) for path in sorted((CONFIGS / "model").glob("*.yaml"))}


def variant(name: str) -> Variant:
    """The variant of that name; UserError names the choices."""
    if name not in variants():
        raise UserError(f"unknown variant {name!r}: choose one of {', '.join(variants())}")
    return variants()[name]


def _read(path: Path) -> Variant:
    row = yaml.safe_load(path.read_text())
    row["network"].pop("_target_")
    return Variant(**{**row, "tasks": tuple(row["tasks"]), "sampling": Sampling(**row["sampling"])})
