"""Make an ablation's table: train, merge, quantise and score what it compares, on all GPUs, and draw it.

    python -m tools.ablate table=methods [scale=tiny] [dst=runs/ablations] [gpus=N] [each=3] [doc=FILE.md]
                           [train="key=value ..."] [score="key=value ..."] [run="key=value ..."]
                           [seeds=N] [teacher=FILE] [launch="..."]

configs/ablations/SCALE/TABLE.yaml says what is compared.  train: added to every training, such as device=cuda
compile=true; score: to every scoring, such as count=64; run: to every infer.py evaluation=...; seeds: at most
so many trainings of each.  The same command again goes on where it stopped; tables in one dst share what they
train alike.  DST/TABLE.md is the result, DST/TABLE/report.html shows videos; doc= gathers all of DST.

scale=wan1_3b needs teacher=, the VAE and text encoder in $TURBODIFFUSION_WEIGHTS, and what experiments and
evaluations ask for: train="data.path=SHARDS negative=FILE" run="prompt_file=VBench_full_info.json".  Where
one GPU is too slow: gpus=0 each=1 launch="-m torch.distributed.run --nproc-per-node 8".
"""

import shlex
import shutil
import string
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import yaml

from tools.jobs import Job, Queue
from tools.options import MISSING, run
from turbodiffusion.checkpoints.files import appearing
from turbodiffusion.errors import UserError
from turbodiffusion.variants import CONFIGS

ROOT = CONFIGS.parent
TABLES = CONFIGS / "ablations"


@dataclass
class Options:
    """The command line."""

    table: str = MISSING
    scale: str = "tiny"
    dst: str = "runs/ablations"
    gpus: int = torch.cuda.device_count()
    each: int = 3 if torch.cuda.is_available() else 1  # jobs at a time on a GPU, or in all
    train: str = ""
    score: str = ""
    run: str = ""
    teacher: str | None = None
    launch: str = ""
    doc: str | None = None
    seeds: int = sys.maxsize


@dataclass(frozen=True)
class Plan:
    """An ablation as its file says it, below `folder`.

    train and make: name -> words, and seeds where there are several, of commands; {other} in them is what
    another one made with that seed, {teacher} a file; make says its tool, merge or quantize.  scores: of the
    small world, name -> rows, label -> one of those names or a file, and words.  runs: label -> ckpt, in
    braces too, and numbers of steps; by infer.py's `evaluation` all are compared with the first.  plots:
    name -> words of evaluation.plot, over all scores.
    """

    folder: Path
    train: dict[str, dict]
    make: dict[str, dict] = field(default_factory=dict)
    scores: dict[str, dict] = field(default_factory=dict)
    runs: dict[str, dict] = field(default_factory=dict)
    evaluation: str = "vbench_quality"
    plots: dict[str, dict[str, str]] = field(default_factory=dict)
    most_seeds: int = sys.maxsize

    def seeds(self, name: str) -> range:
        """The training seeds of a run."""
        return range(min((self.train | self.make)[name].get("seeds", 1), self.most_seeds))

    def file(self, name: str, seed: int) -> Path:
        """What a run makes with a seed."""
        return self.folder / f"{name}_{seed}" / f"{name}_{seed}.safetensors"

    def jobs(self, options: Options) -> dict[str, Job]:
        """Everything that is to be run, by name."""
        made = self.train | self.make
        jobs = [self._making(name, seed, options) for name in made for seed in self.seeds(name)]
        jobs += [self._scoring(name, options) for name in self.scores]
        tables = ",".join(str(self.folder / name / "students.json") for name in self.scores)
        for name, said in self.plots.items():
            picture = self.folder / f"{options.table}_{name}.png"
            drawn = [f"{key}={value}" for key, value in said.items()]
            words = ("-m", "evaluation.plot", f"tables=[{tables}]", f"dst={picture}", *drawn)
            jobs.append(_job(picture.stem, words, {f"score_{name}" for name in self.scores}))
        if self.runs:
            jobs += self._running(options)
        return {job.name: job for job in jobs}

    def _making(self, name: str, seed: int, options: Options) -> Job:
        """A training, or what a tool makes of its results."""
        words, needs = self._filled((self.train | self.make)[name]["words"], seed, options)
        if name in self.make:
            words = ["-m", f"tools.{self.make[name]['tool']}", *words, f"dst={self.file(name, seed)}"]
        else:
            words = [*options.launch.split(), str(ROOT / "train.py"), *words, *options.train.split()]
            words += [f"name={name}_{seed}", f"out={self.folder}", f"seed={seed}"]
        return _job(f"{name}_{seed}", words, needs)

    def _scoring(self, name: str, options: Options) -> Job:
        groups, needs = [], set()
        for label, what in self.scores[name]["rows"].items():
            made = what in self.train | self.make
            files = [str(self.file(what, seed)) for seed in self.seeds(what)] if made else [what]
            needs |= {f"{what}_{seed}" for seed in self.seeds(what)} if made else set()
            groups.append(",".join([f"{label}:{files[0]}", *files[1:]]))
        words = (f"ckpts=[{','.join(groups)}]", f"dst={self.folder / name}")
        given = (*self.scores[name].get("words", "").split(), *options.score.split())
        return _job(f"score_{name}", ("-m", "evaluation.students", *words, *given), needs)

    def _running(self, options: Options) -> Iterator[Job]:
        """Videos and scores of every model at every number of steps, then the comparison."""
        made = []
        for label, said in self.runs.items():
            ckpt, needs = self._filled(f"ckpt={said['ckpt']}", 0, options)
            for steps in said.get("steps", [None]):
                made.append(f"{label} {steps}" if steps else label)
                words = [*ckpt, f"evaluation={self.evaluation}", *options.run.split()]
                words += [f"steps={steps}"] * (steps is not None) + [f"out={self.folder / made[-1]}"]
                start = (*options.launch.split(), str(ROOT / "infer.py"))
                yield _job(f"run_{made[-1]}", (*start, *words), needs)
        folders = ",".join(str(self.folder / name) for name in made)
        words = ("-m", "evaluation.compare", f"runs=[{folders}]", f"out={self.folder / options.table}")
        yield _job(f"compare_{options.table}", words, {f"run_{name}" for name in made})

    def _filled(self, words: str, seed: int, options: Options) -> tuple[list[str], set[str]]:
        """Words with the files that they name in braces, and the jobs that make those."""
        names = {name for _, name, *_ in string.Formatter().parse(words) if name}
        files: dict[str, str | Path] = {}
        if "teacher" in names:
            names.remove("teacher")
            if options.teacher is None:
                raise UserError(f"scale={options.scale} compares with a teacher: pass its file as teacher=")
            files["teacher"] = Path(options.teacher).expanduser().absolute()
        if unknown := names - self.train.keys() - self.make.keys():
            raise UserError(f"{words!r} names {', '.join(unknown)}, which nothing makes")
        files |= {name: self.file(name, seed) for name in names}
        return [word.format(**files) for word in words.split()], {f"{name}_{seed}" for name in names}


def read(options: Options) -> Plan:
    """The plan of a table; UserError where there is none."""
    file = TABLES / options.scale / f"{options.table}.yaml"
    if not file.exists():
        choices = sorted(f"scale={path.parent.name} table={path.stem}" for path in TABLES.glob("*/*.yaml"))
        raise UserError(f"no table={options.table} at scale={options.scale}: choose {'; '.join(choices)}")
    said = yaml.safe_load(file.read_text())
    return Plan(Path(options.dst).expanduser().resolve(), **said, most_seeds=options.seeds)


def report(plan: Plan, options: Options) -> Path:
    """Write the scores, one after the other, and the pictures into one page."""
    page = plan.folder / f"{options.table}.md"
    parts = [f"# {options.table}", f"`python -m tools.ablate {shlex.join(sys.argv[1:])}`"]
    for name in plan.scores:
        parts += [f"## {name}", (plan.folder / name / "students.md").read_text().strip()]
    if plan.runs:
        made = plan.folder / options.table
        parts += ["## differences", (made / "compare.md").read_text().strip()]
    parts += [f"![{name}]({options.table}_{name}.png)" for name in plan.plots]
    with appearing(page) as part:
        part.write_text("\n\n".join(parts) + "\n")
    return page


def gather(folder: Path, doc: Path) -> None:
    """Write all tables of a folder into one document, its pictures beside it."""
    pages = [(folder / f"{name}.md") for name in sorted({path.stem for path in TABLES.glob("*/*.yaml")})]
    parts = [
        "# Ablations",
        "Each table was written by the command below its name, which also writes this file. Those without "
        "`scale=` are about the small world and say nothing about Wan's quality.",
    ]
    for page in filter(Path.is_file, pages):
        parts.append(page.read_text().replace("\n## ", "\n### ").replace("# ", "## ", 1).strip())
        for picture in folder.glob(f"{page.stem}_*.png"):
            with appearing(doc.parent / picture.name) as part:
                shutil.copy(picture, part)
    with appearing(doc) as part:
        part.write_text("\n\n".join(parts) + "\n")


def ablate(options: Options) -> str:
    """Plan, run, write."""
    plan = read(options)
    failed = Queue(plan.folder / "logs", options.gpus, options.each).run(plan.jobs(options))
    if failed:
        raise UserError(f"{len(failed)} jobs failed; the same command tries them again: {'; '.join(failed)}")
    page = report(plan, options)
    if options.doc is not None:
        gather(plan.folder, Path(options.doc).expanduser())
    return f"{page} is written"


def _job(name: str, words: Iterable[str], needs: set[str]) -> Job:
    return Job(name, (sys.executable, *words), frozenset(needs))


main = partial(run, Options, ablate)

if __name__ == "__main__":
    main()
