"""What a step of distillation costs a rank: memory, communication and time, from the networks' sizes alone.

Rates and bytes are calibrated on one H200, eager, bf16 (docs/distillation.md, docs/sparse_attention.md); that
other cards reach the same share of their own peaks is an assumption, and so is every bandwidth between cards.

L tokens of a clip, D width, F inside the feed-forward layers, N blocks, P parameters.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

GIB = 2**30
# of memory a card states: the rest is the driver's, NCCL's, and what the allocator can not use
USABLE = 0.94
# of stated bandwidths, of memory and between cards
OF_MEMORY, OF_LINKS = 0.81, 0.8
# bytes that a block keeps for its backward, a token: 42 D + 4 F; of them with remat, an element of L x D: its
# input, the results of both attentions, and what was measured beyond that where one of them is sparse
KEPT, KEPT_INSIDE = 42, 4
KEPT_WITH = {"block": 2, "keep_attention": 6}
KEPT_BY_SPARSE = 4
# an optimiser's step with all around it reads and writes so many bytes a parameter
UPDATE = 60
# bytes a second to and from a host's memory and in it, with offload: assumed, not measured
TO_HOST, IN_HOST = 8e9, 100e9


class Card(NamedTuple):
    """Stated: operations a second in bf16, bytes a second of memory, of NVLink one way, of the network."""

    rate: float
    memory: float
    nvlink: float
    network: float


CARDS = {
    "h100": Card(989e12, 3.35e12, 450e9, 50e9),
    "h200": Card(989e12, 4.8e12, 450e9, 50e9),
    "a100": Card(312e12, 2.04e12, 300e9, 25e9),
}


class Pass(NamedTuple):
    """Forwards' worth of linear layers and of attention, the share of the peak that attention reaches, dense
    and sparse, bytes moved besides, for an element of L x D in a block, and exchanges of it in a team.
    """

    linear: float
    attention: float
    dense: float
    sparse: float
    moved: float
    exchanged: float


LINEAR = 0.71  # of the peak
PASSES = {
    "forward": Pass(1, 1, 0.58, 0.46, 205, 4),
    "tangent": Pass(2, 3, 0.72, 0.46, 2160, 8),
    "backward": Pass(2, 2.5, 0.52, 0.31, 470, 4),
}
# what a backward computes again
AGAIN = {
    "none": Pass(0, 0, 1, 1, 0, 0),
    "keep_attention": PASSES["forward"]._replace(attention=0),
    "block": PASSES["forward"],
}


class Setting(NamedTuple):
    """Of train.py."""

    shard: int
    context: int
    remat: str


@dataclass(frozen=True)
class Role:
    """A network: parameters, those that train, bytes of their moments; ratio: of sparse attention."""

    parameters: int
    trained: int = 0
    moments: int = 0
    has_average: bool = False
    ratio: float | None = None

    def state(self) -> dict[str, int]:
        """Bytes that it always holds, by kind."""
        masters = 4 * self.trained
        averages = masters if self.has_average else 0
        weights = 2 * self.parameters
        return {"weights": weights, "masters": masters, "moments": self.moments, "averages": averages}


class Turn(NamedTuple):
    """A step of one role: its share of all steps, its losses, and passes by role and kind."""

    role: str
    share: float
    losses: int
    passes: Counter[tuple[str, str]]  # kinds of PASSES but "backward", or "training"


@dataclass(frozen=True)
class Run:
    """An experiment; sizes: those of WanModel, whose blocks have `unit` parameters each."""

    roles: dict[str, Role]
    turns: list[Turn]
    sizes: dict[str, int]
    unit: int
    tokens: int  # of a clip
    batch: int
    accumulate: int
    offload: bool = False  # to the host: all that trains but the weights of passes

    @property
    def clips(self) -> int:
        """Of a team in a step."""
        return self.batch * self.accumulate

    def seconds(self, role: str, spent: Pass, card: Card) -> float:
        """One card's, for one clip."""
        L, D, F, N = self.tokens, *(self.sizes[name] for name in ("dim", "ffn_dim", "layers"))
        S, ratio = self.sizes["text_length"] + self.sizes["clip_tokens"], self.roles[role].ratio
        linear = N * (4 * L * D * (3 * D + F) + 4 * S * D * D)
        across, pairs = N * 4 * L * D * S, N * 4 * L * D * L
        if ratio is None:
            itself = pairs / spent.dense
        else:  # with its linear branch
            itself = (ratio * pairs + N * 6 * L * D * (D // self.sizes["heads"])) / spent.sparse
        products = spent.linear * linear / LINEAR + spent.attention * (across / spent.dense + itself)
        return products / card.rate + spent.moved * N * L * D / (OF_MEMORY * card.memory)


@dataclass(frozen=True)
class Estimate:
    """A rank's costs of a run on so many cards, `node` of them a machine."""

    run: Run
    setting: Setting
    cards: int
    node: int
    card: Card

    @cached_property
    def activations(self) -> dict[str, float]:
        """Bytes that a forward leaves for its backward, "kept", and that it holds of the "block" at hand."""
        run, (_, context, remat), D = self.run, self.setting, self.run.sizes["dim"]
        tokens = run.batch * run.tokens / context
        block = tokens * (KEPT * D + KEPT_INSIDE * run.sizes["ffn_dim"])
        if remat == "none":
            return {"kept": (run.sizes["layers"] - 1) * block, "block": block}
        is_sparse = remat == "keep_attention" and run.roles["student"].ratio is not None
        each = KEPT_WITH[remat] + (KEPT_BY_SPARSE if is_sparse else 0)
        return {"kept": run.sizes["layers"] * tokens * D * each, "block": block}

    @cached_property
    def memory(self) -> dict[str, float]:
        """Bytes by kind at the peak: a backward's start or end, all gradients in fp32, or their mean."""
        run, shard, layers = self.run, self.setting.shard, self.run.sizes["layers"]
        root = run.roles["teacher"].parameters - layers * run.unit
        # weights of this block and the next, its gradients in bf16 and in fp32, and the rest of the network
        gathered = 10 * run.unit + 2 * root if shard > 1 else 0
        kept, block = self.activations["kept"], self.activations["block"]
        stages = []
        for turn in run.turns:
            trained = run.roles[turn.role].trained / shard
            # distill.precision.Masters.collect: a step's first are in bf16 until their backward ends
            whole = 0 if run.offload else 4 * trained
            earlier = whole if turn.losses * run.accumulate > 1 else 0
            copied = 4 * trained if shard == 1 and self.cards > 1 else 0
            stages += [
                {"gradients": earlier, "activations": kept + block, "gathered": gathered},
                {"gradients": 2 * trained, "activations": block, "gathered": gathered},
                {"gradients": whole + copied, "activations": 0, "gathered": 0},
            ]
        states = [role.state() for role in run.roles.values()]
        held = sum(state["weights"] if run.offload else sum(state.values()) for state in states)
        return {"states": held / shard, **max(stages, key=lambda stage: sum(stage.values()))}

    @property
    def host(self) -> int:
        """Bytes of a host's memory that offload takes, a step's gradients with them."""
        roles = self.run.roles.values()
        states = sum(sum(role.state().values()) - role.state()["weights"] for role in roles)
        return states + 4 * max(role.trained for role in roles)

    @property
    def loading(self) -> int:
        """Bytes while networks are sharded: distill.distillation holds the teacher and one more whole."""
        return 4 * self.run.roles["teacher"].parameters

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    def traffic(self, turn: Turn) -> dict[str, float]:
        """Bytes a rank sends in a turn: of gathered weights, of gradients, and of exchanged tokens."""
        run, (shard, context, remat) = self.run, self.setting
        sent = Counter(gathers=0.0, gradients=0.0, replicas=0.0, exchanges=0.0)
        element = 2 * run.batch * run.tokens / context * run.sizes["dim"] * run.sizes["layers"]
        for (role, kind), count in turn.passes.items():
            count *= run.accumulate
            exchanged = sum(part.exchanged for part in parts(kind, remat))
            sent["exchanges"] += count * exchanged * element * (context - 1) / context
            uses = count * (2 if kind == "training" else 1)
            sent["gathers"] += uses * 2 * run.roles[role].parameters * (shard - 1) / shard
        trained = 4 * run.roles[turn.role].trained
        # FSDP sums at every backward; without it the trainer does, once
        sums = turn.losses * run.accumulate if shard > 1 else 1
        sent["gradients"] = sums * trained * (shard - 1) / shard
        sent["replicas"] = sums * 2 * trained / shard * (1 - shard / self.cards)
        return sent

    def seconds(self, turn: Turn, hides: bool = True) -> float:
        """Of a turn.  What FSDP sends hides, if anything does, behind computing as far as that lasts."""
        shard, context, _ = self.setting
        sent, computing = self.traffic(turn), self.computing(turn)
        summed = (sent["gathers"] + sent["gradients"]) / self.link(shard)
        summed += sent["replicas"] / self.link(self.cards // shard, apart=shard)
        together = max(computing, summed) if hides and shard > 1 else computing + summed
        updated = UPDATE / (OF_MEMORY * self.card.memory)
        if self.run.offload:  # a gradient in bf16 for every backward, then the weight
            updated = UPDATE / IN_HOST + 2 * (turn.losses * self.run.accumulate + 1) / TO_HOST
        updated *= self.run.roles[turn.role].trained / shard
        return together + sent["exchanges"] / self.link(context) + updated

    def computing(self, turn: Turn) -> float:
        """A rank's seconds in a turn."""
        passes = (
            count * self.run.seconds(role, part, self.card)
            for (role, kind), count in turn.passes.items()
            for part in parts(kind, self.setting.remat)
        )
        return self.run.clips * sum(passes) / self.setting.context

    @cached_property
    def step(self) -> float:
        """Seconds of a step, a mean over turns."""
        return sum(turn.share * self.seconds(turn) for turn in self.run.turns)

    def busy(self, hides: bool) -> float:
        """The share of a step that goes to computing, in which a card does what one alone would."""
        step = sum(turn.share * self.seconds(turn, hides) for turn in self.run.turns)
        return sum(turn.share * self.computing(turn) for turn in self.run.turns) / step

    @cached_property
    def sent(self) -> dict[str, float]:
        """Bytes a rank sends in a step, a mean over turns."""
        total = Counter()
        for turn in self.run.turns:
            total.update({kind: turn.share * count for kind, count in self.traffic(turn).items()})
        return total

    @property
    def pace(self) -> float:
        """Clips that a card trains on in an hour."""
        return 3600 * self.run.clips / self.setting.context / self.step

    def link(self, members: int, apart: int = 1) -> float:
        """Bytes a second that each of a group sends; its members are so many ranks apart."""
        span = members * apart
        if self.cards <= self.node or self.node % span == 0:
            return OF_LINKS * self.card.nvlink
        # a ring leaves a machine by the network cards of all members there
        return OF_LINKS * min(self.card.nvlink, max(1, self.node // apart) * self.card.network)


def parts(kind: str, remat: str) -> list[Pass]:
    """What a pass is made of."""
    if kind != "training":
        return [PASSES[kind]]
    return [PASSES["forward"], PASSES["backward"], AGAIN[remat]]
