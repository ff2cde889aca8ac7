"""Generate the videos of an evaluation, then score them: what `python infer.py evaluation=...` does.

out/videos gets `{prompt}-{sample}.mp4`, with seed= + 100000 x the prompt's place + sample, as VBench's own
samples have it; whatever is whole there is kept.  out gets what `python -m evaluation` writes.  torchrun
shares the prompts out over its processes.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from evaluation.__main__ import Options as Scoring
from evaluation.__main__ import evaluate
from evaluation.command import write
from evaluation.metrics import DETECTED, METRICS, Upstream, make_metrics
from evaluation.prompts import Suite, read_prompts
from evaluation.runner import wait_for_all
from evaluation.vbench import I2V, T2V
from turbodiffusion.errors import UserError
from turbodiffusion.parallel import own_device, started
from turbodiffusion.pipelines.command import generate
from turbodiffusion.pipelines.options import Options
from turbodiffusion.pipelines.request import pick_device
from turbodiffusion.pipelines.sizes import parse_size
from turbodiffusion.small_world.captions import held_out_prompts

APART = 100_000  # seeds of neighbouring prompts
TINY = 128  # captions of the small world
DIMS = {
    "vbench": (*T2V.dimensions,),
    "vbench_quality": (*T2V.groups["quality"],),
    "i2v": (*I2V.dimensions,),
    "tiny": ("small_world",),
    "custom": (*T2V.groups["quality"],),
}
_WHEEL = (
    "pip download --no-deps vbench==0.1.5 && unzip -p vbench-*.whl vbench/VBench_full_info.json "
    "> VBench_full_info.json"
)
_I2V = "vbench2_i2v_full_info.json of https://github.com/Vchitect/VBench (vbench2_beta_i2v)"
PROMPTS = {"vbench": _WHEEL, "vbench_quality": _WHEEL, "i2v": _I2V, "custom": "a prompt a line in a .txt"}


def generate_and_score(options: Options) -> None:
    """Whatever can be refused is, before any weight is read."""
    if (kind := options.evaluation) not in DIMS:
        raise UserError(f"evaluation={kind}: choose {', '.join(DIMS)}.")
    if options.prompt is not None:
        raise UserError(f"evaluation={kind} takes prompt_file=, not prompt=.")
    rank, world = started()
    out, device = Path(options.out).expanduser(), own_device(pick_device(options.device))
    file = _prompt_file(options, out)
    suite = read_prompts(file)
    bridge = None if options.upstream is None else Upstream(options.upstream, out / f"upstream-{rank}")
    known = [*METRICS, *([] if bridge is None else DETECTED)]
    dims = options.dims or [name for name in DIMS[kind] if name in known]
    make_metrics(dims, upstream=bridge)
    share = list(_items(options, suite, file))[rank::world]
    videos = out / "videos"
    if share:
        write(out, {f"prompts-{rank}.jsonl": "".join(json.dumps(item) + "\n" for item in share)})
        own = {"prompt_file": str(out / f"prompts-{rank}.jsonl"), "out": str(videos), "device": str(device)}
        samples = {"num_samples": suite.samples or options.num_samples, "naming": "{name}-{sample}"}
        cleared = dict.fromkeys(("image", "evaluation", "dims", "augmented", "upstream"))
        generate(replace(options, **own, **samples, **cleared))
    if not options.plan_only:
        wait_for_all(world)
        given = {"prompts": str(file), "upstream": options.upstream, "device": str(device)}
        evaluate(Scoring(str(videos), dims, str(out), **given))


def _prompt_file(options: Options, out: Path) -> Path:
    """The file of prompts, written if it is the small world's; UserError says where to get another."""
    kind, given = options.evaluation, options.prompt_file
    if given is None and kind == "tiny":
        write(out, {"prompts.txt": "".join(f"{prompt.text}\n" for prompt in held_out_prompts(TINY))})
        return out / "prompts.txt"
    if given is None or not (file := Path(given).expanduser()).is_file():
        lost = "" if given is None else f"{given} does not exist: "
        raise UserError(f"{lost}evaluation={kind} needs prompt_file=FILE: {PROMPTS.get(kind, 'a .txt')}.")
    return file


def _items(options: Options, suite: Suite, file: Path) -> Iterator[dict[str, object]]:
    """What each prompt is generated from, as an entry of infer.py's own prompt file."""
    texts = _augmented(options, suite)
    pictures = _crops(options) if options.evaluation == "i2v" else file.parent
    for prompt in suite.prompts:
        item = {"prompt": texts.get(prompt.index, prompt.text), "name": prompt.name}
        item["seed"] = options.seed + APART * prompt.index
        yield item | ({"image": str(pictures.absolute() / prompt.image)} if prompt.image else {})


def _augmented(options: Options, suite: Suite) -> dict[int, str]:
    """Texts to generate from, by the place of the prompts that they stand for."""
    if options.augmented is None:
        return {}
    path = Path(options.augmented).expanduser()
    if not path.is_file():
        raise UserError(f"augmented={path} does not exist.")
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    if len(lines) != (wanted := 1 + max(prompt.index for prompt in suite.prompts)):
        raise UserError(f"{path} has {len(lines)} lines for {wanted} prompts: it must have one for each.")
    return dict(enumerate(lines))


def _crops(options: Options) -> Path:
    """The folder, of those named 16-9 and so on in image=, whose pictures suit the videos' shape."""
    if options.image is None or not (folder := Path(options.image).expanduser()).is_dir():
        raise UserError("evaluation=i2v needs image=DIR: the folder crop/ of VBench-I2V's pictures.")
    size = parse_size(options.size or "480p", options.aspect)

    def distance(crop: Path) -> float:
        width, height = map(int, crop.name.split("-"))
        return abs(math.log(size.width * height / (size.height * width)))

    return min((each for each in folder.glob("[0-9]*-[0-9]*") if each.is_dir()), key=distance, default=folder)
