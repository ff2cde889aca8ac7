"""Options -> what will be made, checked before any model is loaded."""

import os
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.options import Options
from turbodiffusion.pipelines.prompts import Item, read_items, slug
from turbodiffusion.pipelines.schedule import choose_sampler, sampling_times
from turbodiffusion.pipelines.sizes import Size, adaptive_size, check_frames, check_size, parse_size
from turbodiffusion.pipelines.video_io import read_picture
from turbodiffusion.samplers.denoiser import experts_used
from turbodiffusion.samplers.noise import SEEDS
from turbodiffusion.variants import Sampling, Variant

VIDEO, PICTURE = ".mp4", ".png"
FORMATS = {VIDEO, PICTURE, ".avi", ".gif", ".jpeg", ".jpg", ".mkv", ".mov", ".webm", ".webp"}
DEMO_PROMPT = "an octopus drifts left across a teal background"
STRETCH = 1.1  # a picture whose shape is farther from the frame's looks distorted


@dataclass(frozen=True, kw_only=True)
class Shot(Item):
    """An item with nothing left open, its size, and the files it becomes, one per seed."""

    size: Size
    outputs: dict[int, Path]  # by seed


@dataclass(frozen=True)
class Request:
    """All that a run will do."""

    shots: tuple[Shot, ...]
    frames: int
    sampling: Sampling


def resolve(options: Options, variant: Variant, sampling: Sampling, multiple: int) -> Request:
    """Check all that can be checked without weights; UserError says what does not fit and what would."""
    items = _items(options, sampling)
    pictured = {(item.image is not None, item.last_image is not None) for item in items}
    tasks = {choose_task(variant, has_image=image, has_last=last) for image, last in pictured}
    sampling = _sampling(options, sampling, min(tasks))
    frames = check_frames(sampling.frames)
    if frames == 1 and tasks != {"t2v"}:
        raise UserError("frames=1 makes a picture from text alone: leave image= away, or ask for 5 frames.")
    area = parse_size(options.size or sampling.size, options.aspect)
    outputs = _outputs(options, items, PICTURE if frames == 1 else VIDEO)
    shots = [
        Shot(**vars(item), size=_size(item, area, multiple, adaptive=options.adaptive), outputs=files)
        for item, files in zip(items, outputs, strict=True)
    ]
    return Request(tuple(shots), frames, sampling)


def choose_task(variant: Variant, *, has_image: bool, has_last: bool) -> str:
    """t2v, i2v, flf2v or ti2v: what the variant does with these pictures."""
    name, tasks = variant.name, variant.tasks
    if has_last and "flf2v" not in tasks:
        raise UserError(f"{name} takes no last_image=: only first-last-frame models do (wan2.1_flf2v_14b).")
    if has_image and tasks == ("t2v",):
        raise UserError(f"{name} makes videos from text alone: leave image= away, or take an i2v model.")
    if not has_image and "t2v" not in tasks:
        raise UserError(f"{name} continues a picture: pass image=FILE.")
    if "flf2v" in tasks and not has_last:
        raise UserError(f"{name} goes from a first to a last picture: pass last_image=FILE too.")
    return next(task for task in tasks if (task != "t2v") == has_image)


def pick_device(name: str) -> torch.device:
    """The device of that name; auto is the accelerator PyTorch sees, or the CPU."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        backend = torch.get_device_module(device)
    except RuntimeError as error:
        raise UserError(f"device={name} is not a device: pass auto, cpu, cuda, cuda:1 or mps.") from error
    count = backend.device_count() if backend.is_available() else 0
    if (device.index or 0) >= count:
        seen = count or "none"
        raise UserError(f"device={name}: PyTorch sees {seen} of that kind; pass device=cpu or auto.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 or float32; auto is bfloat16 except on a CPU."""
    auto = torch.float32 if device.type == "cpu" else torch.bfloat16
    choices = {"auto": auto, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in choices:
        raise UserError(f"dtype={name} is not one of {', '.join(choices)}.")
    return choices[name]


def _items(options: Options, sampling: Sampling) -> list[Item]:
    """What to make; what an item leaves open is as on the command line, else as in the checkpoint."""
    if options.prompt is not None and options.prompt_file is not None:
        raise UserError("prompt= and prompt_file= exclude each other: pass one of them.")
    prompt = DEMO_PROMPT if options.prompt is None and options.ckpt is None else options.prompt
    if options.prompt_file is not None:
        items = read_items(Path(options.prompt_file).expanduser())
    elif prompt is None:
        raise UserError('pass prompt="..." or prompt_file=FILE.')
    else:
        items = [Item(prompt, name=slug(prompt))]
    if any(not item.prompt.strip() for item in items):
        raise UserError("the prompt is empty: say what the video should show.")
    image, last = (None if p is None else Path(p).expanduser() for p in (options.image, options.last_image))
    negative = sampling.negative_prompt if options.negative_prompt is None else options.negative_prompt
    given = {"image": image, "last_image": last, "negative_prompt": negative, "seed": options.seed}
    return [replace(item, **{k: v for k, v in given.items() if getattr(item, k) is None}) for item in items]


def _sampling(options: Options, defaults: Sampling, task: str) -> Sampling:
    """The checkpoint's defaults with what the user said."""
    sampling = choose_sampler(defaults, options.sampler, task)
    names = ("steps", "guidance", "shift", "sigma_max", "boundary", "frames", "fps", "negative_prompt")
    said = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.guidance is not None and sampling.guidance_low is not None:
        said["guidance_low"] = options.guidance
    sampling = replace(sampling, **said)
    if sampling.fps <= 0:
        raise UserError(f"fps={sampling.fps}: it must be greater than 0.")
    if not 0 <= options.crf <= 51:
        raise UserError(f"crf={options.crf}: it goes from 0 (lossless) to 51.")
    times = sampling_times(sampling)
    if defaults.boundary is None and options.boundary is not None:
        raise UserError("boundary= is where the second expert takes over, and this model has one network.")
    if sampling.boundary is not None and len(used := experts_used(times, sampling.boundary)) < 2:
        never = "low" if used == ("high",) else "high"
        warnings.warn(
            f"{sampling.steps} steps never reach the {never}-noise expert (boundary {sampling.boundary}): "
            "take more steps, or another boundary=.",
            stacklevel=2,
        )
    return sampling


def _size(item: Item, area: Size, multiple: int, *, adaptive: bool) -> Size:
    """The frame's size; opens the item's pictures, so that a bad one is found now."""
    pictures = [read_picture(path) for path in (item.image, item.last_image) if path is not None]
    if not pictures:
        if adaptive:
            raise UserError("adaptive=true takes the shape of the image: pass image=FILE.")
        return check_size(area, multiple)
    _, height, width = pictures[0].shape
    shape = Size(width, height)
    if adaptive:
        return adaptive_size(area, shape, multiple)
    if not 1 / STRETCH < (width * area.height) / (height * area.width) < STRETCH:
        said = f"{item.image} is {shape} and is stretched to {area}: adaptive=true keeps its shape."
        warnings.warn(said, stacklevel=2)
    return check_size(area, multiple)


def _outputs(options: Options, items: list[Item], suffix: str) -> list[dict[int, Path]]:
    """The files of each item, by seed; makes the folder."""
    if options.num_samples < 1:
        raise UserError(f"num_samples={options.num_samples}: take at least one.")
    out = Path(options.out).expanduser()
    if out.suffix in FORMATS - {suffix}:
        what = "one frame is written as" if suffix == PICTURE else "videos are written as"
        raise UserError(f"out={out}: {what} {suffix}; pass such a file, or a folder.")
    is_file = out.suffix == suffix
    if is_file and options.prompt_file is not None:
        raise UserError(f"out={out}: a prompt file makes many videos, so pass a folder.")
    _make_folder(out.parent if is_file else out)
    is_exact = is_file and options.num_samples == 1
    outputs = []
    for item in items:
        seeds = range(item.seed, item.seed + options.num_samples)
        if seeds[0] not in SEEDS or seeds[-1] not in SEEDS:
            raise UserError(f"seed={item.seed}: seeds go from 0 to {SEEDS[-1]}.")
        folder, name = (out.parent, out.stem) if is_file else (out, item.name)
        names = [_file_name(options.naming, name, seed, sample) for sample, seed in enumerate(seeds)]
        files = [out] if is_exact else [folder / f"{each}{suffix}" for each in names]
        outputs.append(dict(zip(seeds, files, strict=True)))
    counts = Counter(file for files in outputs for file in files.values())
    if twice := {file for file, count in counts.items() if count > 1}:
        raise UserError(f"two prompts would be written to {min(twice)}: give them different names.")
    return outputs


def _file_name(naming: str, name: str, seed: int, sample: int) -> str:
    try:
        made = naming.format(name=name, seed=seed, sample=sample)
    except (ValueError, LookupError) as error:
        raise UserError(f"naming={naming}: it may name {{name}}, {{seed}} and {{sample}}.") from error
    if Path(made).name != made or made.startswith("."):
        raise UserError(f"naming={naming}: {made!r} is not a plain file name.")
    return made


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out=: the folder {folder} can not be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"out=: the folder {folder} can not be written to.")
