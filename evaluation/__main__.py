"""Scores the videos of a folder.

    python -m evaluation videos=DIR dims=[temporal_flickering,...] out=DIR [prompts=FILE] [reference=DIR]
                         [weights=DIR] [upstream=PYTHON] [device=cuda]

Files are named `{prompt}-{sample}.mp4`; prompts= (.txt, .json, .jsonl, or VBench_full_info.json) says what
was asked for where names do not, and what is missing.  psnr and ssim compare with the file of the same name
in reference=.  Dimensions that need VBench's detectors are scored by the interpreter upstream=, which has
vbench installed.  After an interruption the same command goes on; `torchrun --nproc-per-node 8 -m evaluation
...` shares the videos out over GPUs.  DIR gets results.json, report.md, report.html, records.jsonl (a
line a video and dimension), run.json (what was run, on what) and eval_results.json in the leaderboard's form.
Exit code 2: some could not be scored; the report names them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from omegaconf import MISSING
from rich.console import Console

from evaluation.command import run, write
from evaluation.export import RESULTS, UPSTREAM, upstream
from evaluation.metrics import Upstream, VideoMetric, make_metrics
from evaluation.prompts import Suite, read_prompts
from evaluation.records import Record, line_of
from evaluation.report import markdown, summarise
from evaluation.report_page import page, read_run
from evaluation.runner import collect, plan, score_all, wait_for_all
from evaluation.videos import Found, find_videos
from turbodiffusion.checkpoints.saving import write_json
from turbodiffusion.errors import UserError
from turbodiffusion.parallel import own_device, started
from turbodiffusion.pipelines.record import environment


@dataclass
class Options:
    """The command line."""

    videos: str = MISSING
    dims: list[str] = MISSING
    out: str = MISSING
    prompts: str | None = None
    reference: str | None = None
    weights: str | None = None
    upstream: str | None = None
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def evaluate(options: Options) -> None:
    """Score, write and show; everything that can be refused is, before the first video is read."""
    folder, out = Path(options.videos).expanduser(), Path(options.out).expanduser()
    rank, world = started()
    bridge = None if options.upstream is None else Upstream(options.upstream, out / f"upstream-{rank}")
    metrics = make_metrics(options.dims, options.weights, bridge)
    suite = None if options.prompts is None else read_prompts(Path(options.prompts).expanduser())
    reference = None if options.reference is None else Path(options.reference).expanduser()
    if reference is None and (paired := [name for name, each in metrics.items() if each.needs_reference]):
        raise UserError(f"{' and '.join(paired)}: give the folder of videos to compare with as reference=DIR")
    found = find_videos(folder, suite, reference)
    tasks = plan(found.videos, metrics)
    score_all(tasks, out, own_device(torch.device(options.device)), rank=rank, world=world)
    wait_for_all(world)
    if rank == 0:
        records = collect(tasks, out)
        made = {"options": asdict(options), "videos": str(folder.absolute()), "environment": environment()}
        write_json(out / "run.json", made)
        results = written(out, metrics, records, found, suite)
        Console().print(markdown(results, out.name), markup=False, soft_wrap=True)
        if lost := {failure["video"] for failure in results["failures"]}:
            raise UserError(
                f"{len(lost)} of {len(found.videos)} videos could not be scored: see {out}/report.md"
            )


def written(
    out: Path, metrics: Mapping[str, VideoMetric], records: list[Record], found: Found, suite: Suite | None
) -> dict[str, object]:
    """Write the files of a run -> the content of its results.json."""
    results = summarise(metrics, records, found, suite)
    folder = found.videos[0].path.parent
    raw = {name: each["raw"] for name, each in results["dimensions"].items() if each["raw"] is not None}
    write_json(out / RESULTS, results)
    write_json(out / UPSTREAM, upstream(records, raw, folder))
    texts = {"records.jsonl": "".join(map(line_of, records)), "report.md": markdown(results, out.name)}
    write(out, texts | {"report.html": page(out.name, [read_run(out, out.name, records)])})
    return results


if __name__ == "__main__":
    run(Options, evaluate)
