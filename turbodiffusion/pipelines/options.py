"""The options of infer.py as one typed value; their meaning and their defaults are in configs/infer.yaml."""

from dataclasses import dataclass

from omegaconf import MISSING, DictConfig, OmegaConf


@dataclass
class Options:
    """A line of configs/infer.yaml each.  None: what the checkpoint says."""

    ckpt: str | None = MISSING
    ckpt_low: str | None = MISSING
    variant: str | None = MISSING
    vae: str | None = MISSING
    text_encoder: str | None = MISSING
    tokenizer: str | None = MISSING
    image_encoder: str | None = MISSING
    prompt: str | None = MISSING
    prompt_file: str | None = MISSING
    negative_prompt: str | None = MISSING
    image: str | None = MISSING
    last_image: str | None = MISSING
    size: str | None = MISSING
    aspect: str = MISSING
    adaptive: bool = MISSING
    frames: int | None = MISSING
    seed: int = MISSING
    num_samples: int = MISSING
    sampler: str = MISSING
    steps: int | None = MISSING
    guidance: float | None = MISSING
    shift: float | None = MISSING
    sigma_max: float | None = MISSING
    ode: bool = MISSING
    boundary: float | None = MISSING
    device: str = MISSING
    dtype: str = MISSING
    attention: str | None = MISSING
    ratio: float | None = MISSING
    block_q: int | None = MISSING
    block_k: int | None = MISSING
    drop_linear: bool = MISSING
    quant: str = MISSING
    offload: str = MISSING
    graph: str = MISSING
    parallel: str = MISSING
    compile: bool = MISSING
    text_cache: str = MISSING
    tiling: str = MISSING
    plan_only: bool = MISSING
    out: str = MISSING
    naming: str = MISSING
    crf: int = MISSING
    fps: float | None = MISSING
    evaluation: str | None = MISSING
    dims: list[str] | None = MISSING
    augmented: str | None = MISSING
    upstream: str | None = MISSING


def read(cfg: DictConfig) -> Options:
    """The composed config, types checked."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), cfg))
