"""Make an ablation's table: train, merge and score what it compares, on all GPUs at once, and draw it.

    python -m tools.ablate table=methods [scale=tiny] [dst=runs/ablations] [gpus=N] [each=3]
                           [train="key=value ..."] [score="key=value ..."]

configs/ablations/SCALE/TABLE.yaml says what is compared.  train: added to every training, such as device=cuda
compile=true; score: to every scoring, such as count=64.  The same command again goes on where it stopped;
tables in one dst share what they train alike.  DST/TABLE.md is the result.
"""

import string
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from rich.console import Console

from tools.jobs import Job, Queue
from tools.options import MISSING, parse
from turbodiffusion.checkpoints.files import appearing
from turbodiffusion.cli import one_sentence
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


@dataclass(frozen=True)
class Plan:
    """An ablation as its file says it, below `folder`.

    train and merge: name -> words, and seeds where there are several, of commands; {other} in them is what
    another one made with that seed.  scores: name -> rows, label -> one of those names or a file, and words.
    """

    folder: Path
    train: dict[str, dict]
    scores: dict[str, dict]
    plot: dict[str, str]
    merge: dict[str, dict]

    def seeds(self, name: str) -> range:
        """The training seeds of a run."""
        return range((self.train | self.merge)[name].get("seeds", 1))

    def file(self, name: str, seed: int) -> Path:
        """What a run makes with a seed."""
        return self.folder / f"{name}_{seed}" / f"{name}_{seed}.safetensors"

    def jobs(self, options: Options) -> dict[str, Job]:
        """Everything that is to be run, by name."""
        jobs = [self._training(name, seed, options) for name in self.train for seed in self.seeds(name)]
        jobs += [self._merging(name, seed) for name in self.merge for seed in self.seeds(name)]
        jobs += [self._scoring(name, options) for name in self.scores]
        tables = ",".join(str(self.folder / name / "students.json") for name in self.scores)
        picture = self.folder / f"{options.table}.png"
        drawn = [f"{key}={value}" for key, value in self.plot.items()]
        words = ("-m", "evaluation.plot", f"tables=[{tables}]", f"dst={picture}", *drawn)
        jobs.append(_job(f"plot_{options.table}", words, {f"score_{name}" for name in self.scores}))
        return {job.name: job for job in jobs}

    def _training(self, name: str, seed: int, options: Options) -> Job:
        words, needs = self._filled(self.train[name]["words"], seed)
        own = (f"name={name}_{seed}", f"out={self.folder}", f"seed={seed}")
        return _job(f"{name}_{seed}", (str(ROOT / "train.py"), *words, *options.train.split(), *own), needs)

    def _merging(self, name: str, seed: int) -> Job:
        words, needs = self._filled(self.merge[name]["words"], seed)
        return _job(f"{name}_{seed}", ("-m", "tools.merge", *words, f"dst={self.file(name, seed)}"), needs)

    def _scoring(self, name: str, options: Options) -> Job:
        groups, needs = [], set()
        for label, what in self.scores[name]["rows"].items():
            made = what in self.train | self.merge
            files = [str(self.file(what, seed)) for seed in self.seeds(what)] if made else [what]
            needs |= {f"{what}_{seed}" for seed in self.seeds(what)} if made else set()
            groups.append(",".join([f"{label}:{files[0]}", *files[1:]]))
        words = (f"ckpts=[{','.join(groups)}]", f"dst={self.folder / name}")
        given = (*self.scores[name].get("words", "").split(), *options.score.split())
        return _job(f"score_{name}", ("-m", "evaluation.students", *words, *given), needs)

    def _filled(self, words: str, seed: int) -> tuple[list[str], set[str]]:
        """Words with the files that they name in braces, and the jobs that make those."""
        names = {name for _, name, *_ in string.Formatter().parse(words) if name}
        if unknown := names - self.train.keys() - self.merge.keys():
            raise UserError(f"{words!r} names {', '.join(unknown)}, which nothing makes")
        files = {name: self.file(name, seed) for name in names}
        return [word.format(**files) for word in words.split()], {f"{name}_{seed}" for name in names}


def read(options: Options) -> Plan:
    """The plan of a table; UserError where there is none."""
    file = TABLES / options.scale / f"{options.table}.yaml"
    if not file.exists():
        choices = sorted(f"scale={path.parent.name} table={path.stem}" for path in TABLES.glob("*/*.yaml"))
        raise UserError(f"no table={options.table} at scale={options.scale}: choose {'; '.join(choices)}")
    said = {"merge": {}, "plot": {}} | yaml.safe_load(file.read_text())
    return Plan(Path(options.dst).expanduser().resolve(), **said)


def report(plan: Plan, options: Options) -> Path:
    """Write the scores, one after the other, and the picture into one page."""
    page = plan.folder / f"{options.table}.md"
    parts = [f"# {options.table}", f"`python -m tools.ablate {' '.join(sys.argv[1:])}`"]
    for name in plan.scores:
        parts += [f"## {name}", (plan.folder / name / "students.md").read_text().strip()]
    parts.append(f"![{options.table}]({options.table}.png)")
    with appearing(page) as part:
        part.write_text("\n\n".join(parts) + "\n")
    return page


def main() -> None:
    """Plan, run, write."""
    with one_sentence():
        options, console = parse(Options, sys.argv[1:]), Console()
        plan = read(options)
        failed = Queue(plan.folder / "logs", options.gpus, options.each).run(plan.jobs(options))
        if failed:
            raise UserError(
                f"{len(failed)} jobs failed; the same command tries them again: {'; '.join(failed)}"
            )
        console.print(f"{report(plan, options)} is written", soft_wrap=True)


def _job(name: str, words: tuple[str, ...], needs: set[str]) -> Job:
    return Job(name, (sys.executable, *words), frozenset(needs))


if __name__ == "__main__":
    main()
