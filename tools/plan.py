"""Say what an experiment needs before a machine is rented: memory, communication, time, and what fits.

    python -m tools.plan experiment=rcm_wan14b gpus=8 memory=80
    python -m tools.plan experiment=rcm_wan14b gpus=64 size=720p card=h200 context=8 accumulate=4

gpus: in all, `node` of them a machine; memory: GiB of a card.  shard, context and remat are tried in all ways
unless given.  Further words are train.py's: data.frames=21 (latent), batch=, offload=true.  Nothing is
allocated: networks are built on the meta device; tools/plan_cost.py says what is counted, and by what rates.

The second table: a rank's GiB at the peak and of activations, and its tokens; all clips of a step; GB that a
rank sends in it, by purpose; the share of it that computing takes, if no traffic hides behind that and if
FSDP's does; clips an hour of a card.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import product

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from distill.dcm import DCMLoss
from distill.distillation import choose_trained
from distill.optim import Optim
from distill.rcm import Method
from distill.remat import MODES, rematerialize
from distill.sla import Alignment
from tools.options import MISSING, parse
from tools.plan_cost import CARDS, GIB, USABLE, Estimate, Role, Run, Setting, Turn
from turbodiffusion.cli import one_sentence
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import PATCH, WanModel
from turbodiffusion.parallel.context import check_heads
from turbodiffusion.pipelines.sizes import check_size, latent_frames, parse_size
from turbodiffusion.variants import CONFIGS, variant

# an experiment does not say what its teacher is; its name does
TEACHERS = {
    "wan1_3b": "wan2.1_t2v_1.3b",
    "wan14b": "wan2.1_t2v_14b",
    "wan2_2_i2v": "wan2.2_i2v_a14b",
}
ROWS = 16


@dataclass
class Options:
    """The command line; variant: the teacher, null: as the experiment's name says."""

    experiment: str = MISSING
    gpus: int = MISSING
    memory: float = 80
    node: int = 8
    card: str = "h100"
    variant: str | None = None
    size: str = "480p"
    shard: int | None = None
    context: int | None = None
    remat: str | None = None

    def __post_init__(self):
        if self.card not in CARDS:
            raise UserError(f"card={self.card}: choose {', '.join(CARDS)}")
        if self.node < 1 or self.gpus < 1 or (self.gpus > self.node and self.gpus % self.node):
            raise UserError(f"gpus={self.gpus} are not whole machines of node={self.node}")
        rematerialize([], self.remat or "none")  # refuses what is none of its modes
        for name in ("shard", "context"):
            count = getattr(self, name)
            if count is not None and (count < 1 or self.gpus % count):
                fitting = ", ".join(map(str, divisors(self.gpus)))
                raise UserError(f"{name}={count} does not divide gpus={self.gpus}: take one of {fitting}")


def divisors(count: int) -> list[int]:
    """From 1 to the number itself."""
    return [n for n in range(1, count + 1) if count % n == 0]


def described(options: Options, words: list[str]) -> Run:
    """What train.py would build of the experiment with these further words."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", [f"experiment={options.experiment}", *words])
    method = instantiate(config.recipe.get("objective"))
    if not isinstance(method, Method | Alignment):
        raise UserError(f"experiment={options.experiment} is no distillation: nothing else can be planned")
    if config.precision != "bfloat16":
        raise UserError(f"precision={config.precision}: only bfloat16 is planned")
    if config.offload and options.gpus > 1:
        raise UserError(f"offload=true is for gpus=1, not {options.gpus}: several have less to hold each")
    names = [name for part, name in TEACHERS.items() if part in options.experiment]
    if options.variant is None and not names:
        raise UserError(f"experiment={options.experiment} does not say its teacher: add variant=")
    row = variant(options.variant or names[0])
    frames = config.get("data", {}).get("frames") or latent_frames(row.sampling.frames)
    pixels = PATCH[1] * (16 if row.vae == "wan2.2" else 8)  # a token's
    size = check_size(parse_size(options.size), pixels)
    with torch.device("meta"):
        network = WanModel(**row.network)
    optims = {name: instantiate(optim) for name, optim in config.optims.items()}
    return Run(
        roles=roles(config.recipe, method, row.network, optims),
        turns=turns(method),
        sizes=network.config,
        unit=_count(network.blocks[0].parameters()),
        tokens=frames * (size.height // pixels) * (size.width // pixels),
        batch=config.batch,
        accumulate=config.accumulate,
        offload=config.offload,
    )


def roles(
    recipe: DictConfig, method: Method | Alignment, sizes: dict[str, int], optims: dict[str, Optim]
) -> dict[str, Role]:
    """The networks as distill.distillation makes them."""
    with torch.device("meta"):
        teacher, student = WanModel(**sizes), WanModel(**sizes)
    if recipe.get("attention") is not None:
        student.set_attention(dict(recipe.attention))
    choose_trained(student, recipe.get("trainable", "all"))
    trained = {"student": student} | ({"critic": teacher} if method.has_critic else {})
    made = {name: _role(name, network, optims) for name, network in trained.items()}
    return {"teacher": Role(_count(teacher.parameters())), **made}


def _role(name: str, network: WanModel, optims: dict[str, Optim]) -> Role:
    parameters, optim = list(network.parameters()), optims.get(name, optims["default"])
    trained = [p for p in parameters if p.requires_grad]
    # AdamW has two moments, but where beta1 is 0; Muon has one
    halved = [p for p in trained if optim.betas[0] == 0 or (optim.matrices == "muon" and p.ndim == 2)]
    moments = 8 * _count(trained) - 4 * _count(halved)
    ratio = network.config["attention"].get("ratio")
    return Role(_count(parameters), _count(trained), moments, has_average=name == "student", ratio=ratio)


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def turns(method: Method | Alignment) -> list[Turn]:
    """After warm-up; a rollout is of a mean number of passes."""
    passes, losses = Counter({("student", "training"): 1}), 1
    if isinstance(method, Alignment):
        return [Turn("student", 1, losses, passes + Counter({("teacher", "forward"): 1}))]
    guided, part = 2 if method.guidance != 1 else 1, method.matching
    target = Counter({("teacher", "forward"): guided})
    if method.consistency is None:
        passes, losses = Counter(), 0
    elif isinstance(method.consistency.loss, DCMLoss):
        passes += Counter({("student", "forward"): 1})
        passes["teacher", "forward"] = guided * method.consistency.times.skip
    else:
        passes += target + Counter({("student", "tangent"): 1})
    if part is None:
        return [Turn("student", 1, losses, passes)]
    rollout = sum(part.steps) / len(part.steps)
    matching = {("student", "forward"): rollout - 1, ("student", "training"): 1, ("critic", "forward"): 1}
    critic = Counter({("student", "forward"): rollout, ("critic", "training"): 1})
    return [
        Turn("student", 1 / part.student_every, losses + 1, passes + target + Counter(matching)),
        Turn("critic", 1 - 1 / part.student_every, 1, critic),
    ]


def candidates(options: Options, run: Run) -> Iterator[Estimate]:
    """Every setting that train.py would take; UserError for heads that do not divide."""
    heads, node = run.sizes["heads"], min(options.node, options.gpus)
    check_heads(heads, options.context or 1)
    shards = [n for n in divisors(options.gpus) if n % node == 0 or node % n == 0]
    # exchanges can not hide: teams stay within a machine
    contexts = [n for n in divisors(node) if heads % n == 0]
    given = ([options.shard], [options.context], [options.remat])
    tried = (shards, contexts, MODES)
    for way in product(*(every if one == [None] else one for one, every in zip(given, tried, strict=True))):
        yield Estimate(run, Setting(*way), options.gpus, options.node, CARDS[options.card])


def fits(options: Options, estimate: Estimate) -> bool:
    """Whether training does."""
    return estimate.peak <= USABLE * options.memory * GIB


def best(options: Options, estimates: list[Estimate]) -> Estimate:
    """The fastest a card that fits; of those as fast within 1 %, the one that shards least."""
    fitting = [each for each in estimates if fits(options, each)]
    if not fitting:
        least = min(estimates, key=lambda each: each.peak)
        raise UserError(
            f"nothing fits {USABLE:.0%} of memory={options.memory:g}: the least is {least.peak / GIB:.1f} "
            f"GiB, with {words_of(least.setting)}; take more gpus= or cards of more memory="
        )
    fastest = max(each.pace for each in fitting)
    near = [each for each in fitting if each.pace >= 0.99 * fastest]
    return min(near, key=lambda each: (each.setting.shard, each.peak))


def words_of(setting: Setting) -> str:
    """As train.py takes them."""
    return " ".join(f"{name}={value}" for name, value in setting._asdict().items())


def command(options: Options, setting: Setting, words: list[str]) -> str:
    """The best's."""
    machines = options.gpus // options.node
    where = f"--nnodes={machines} --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 " if machines > 1 else ""
    each = min(options.node, options.gpus)
    further = " ".join(["teacher=PATH data.path=SHARDS negative=PATH", *words, words_of(setting)])
    return f"torchrun {where}--nproc-per-node={each} train.py experiment={options.experiment} {further}"


def table_of_states(estimate: Estimate) -> Table:
    """By role and kind; then what comes and goes, as it is at the peak."""
    columns = ("weights, bf16", "masters, fp32", "moments, fp32", "averages, fp32", "all")
    table = Table("GiB a rank", *columns, title=words_of(estimate.setting))
    for name, role in estimate.run.roles.items():
        held = [count / estimate.setting.shard / GIB for count in role.state().values()]
        table.add_row(name, *(f"{gib:.2f}" for gib in (*held, sum(held))))
    table.add_section()
    for name, count in {**estimate.memory, "peak": estimate.peak}.items():
        table.add_row(name, "", "", "", "", f"{count / GIB:.2f}")
    return table


def table_of_settings(options: Options, estimates: list[Estimate], chosen: Estimate) -> Table:
    """The fastest that fit, then the smallest that do not."""
    fitting = sorted((each for each in estimates if fits(options, each)), key=lambda each: -each.pace)
    others = sorted((each for each in estimates if not fits(options, each)), key=lambda each: each.peak)
    sent = ("gathers", "gradients", "replicas", "exchanges")
    names = ("fits", "peak", "activ.", "tokens", "clips", *sent, "s/step", "busy", "clips/h")
    table = Table(*Setting._fields, *names)
    for each in (fitting + others)[:ROWS]:
        table.add_row(
            *map(str, each.setting),
            "best" if each is chosen else "yes" if each in fitting else "no",
            *(f"{count / GIB:.1f}" for count in (each.peak, sum(each.activations.values()))),
            f"{each.run.batch * each.run.tokens // each.setting.context:,}",
            f"{options.gpus // each.setting.context * each.run.clips}",
            *(f"{each.sent[name] / 1e9:.1f}" for name in sent),
            *(f"{each.step:.2f}", f"{each.busy(False):.0%} to {each.busy(True):.0%}", f"{each.pace:.0f}"),
        )
    return table


def report(options: Options, words: list[str], console: Console) -> None:
    """Both tables, and the command of the best."""
    estimates = list(candidates(options, described(options, words)))
    chosen = best(options, estimates)
    console.print(table_of_states(chosen))
    console.print(table_of_settings(options, estimates, chosen))
    console.print(command(options, chosen.setting, words), soft_wrap=True, markup=False, highlight=False)
    if chosen.run.offload:
        console.print(f"Masters, moments, averages and gradients: {chosen.host / GIB:.0f} GiB of the host's.")
    if chosen.loading > USABLE * options.memory * GIB:
        console.print(
            f"It will not start: before they are sharded, a rank holds two networks whole, "
            f"{chosen.loading / GIB:.1f} GiB, more than {USABLE:.0%} of memory={options.memory:g}."
        )


def main() -> None:
    """Entry point."""
    with one_sentence():
        ours = [word for word in sys.argv[1:] if word.partition("=")[0] in {f.name for f in fields(Options)}]
        words = [word for word in sys.argv[1:] if word not in ours]
        options, console = parse(Options, ours), Console(width=160)
        report(options, words, console)


if __name__ == "__main__":
    main()
