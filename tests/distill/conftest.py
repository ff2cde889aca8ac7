"""A toy regression and a very small student, both trained by the real trainer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from distill.data import Encoded, LatentClips
from distill.flow_matching import FlowMatching, TextToVelocity
from distill.objective import Parts, Product, Watch
from distill.optim import Optim
from distill.times import LogNormal
from distill.tracking import Tracker
from distill.trainer import Plan, Trainer
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.tokenizers import ByteTokenizer
from turbodiffusion.models.wan import WanModel


class Line(nn.Module):
    """y = x w."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@dataclass
class Regression:
    """Squared error against noisy truth; the noise comes from the trainer's generator."""

    line: Line = field(default_factory=Line)
    noise: float = 0.1
    poison_at: int | None = None
    averaged: tuple[str, ...] = ("line",)

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"line": self.line}

    def turn(self, step: int) -> str:
        return "line"

    def losses(
        self, batch: Tensor, step: int, rng: torch.Generator, watch: Watch
    ) -> Iterator[tuple[str, Tensor]]:
        truth = batch.sum(dim=1, keepdim=True) + self.noise * torch.randn(len(batch), 1, generator=rng)
        error = (self.line(batch) - truth).square().flatten(1).mean(1)
        yield "square", error / (0.0 if step == self.poison_at else 1.0)


@dataclass(frozen=True)
class Rows:
    """Rows of one fixed matrix, `count` a batch."""

    count: int = 8

    def batch(self, number: int) -> Tensor:
        rows = torch.randn(512, 4, generator=torch.Generator().manual_seed(1))
        return rows.view(-1, self.count, 4)[number % (512 // self.count)]


@dataclass
class Silent:
    """Shows black, ships nothing, remembers the averages it was shown."""

    shown: list[dict[str, Tensor]] = field(default_factory=list)

    def measure(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        self.shown.append(
            {name: p.clone() for net in networks.values() for name, p in net.named_parameters()}
        )
        return {"size": 1.0}

    def verdict(self, measures: dict[str, float]) -> str:
        return f"the size is {measures['size']:g}"

    def preview(self, networks: dict[str, nn.Module]) -> Tensor:
        return torch.zeros(1, 1, 3, 2, 4, 4)

    def products(self, networks: dict[str, nn.Module]) -> list[Product]:
        return []


PLAN = Plan(steps=12, log_every=1, save_every=1000, preview_every=1000)


@pytest.fixture
def toy(tmp_path: Path) -> Callable[..., Trainer]:
    """Makes a trainer of the toy regression in batches of `rows`; other keywords change the plan."""

    def make(
        folder: str = "toy",
        *,
        rows: int = 8,
        poison_at: int | None = None,
        noise: float = 0.1,
        tracker: Tracker | None = None,
        matrices: str = "adamw",
        beta1: float = 0.9,
        **plan: float,
    ) -> Trainer:
        parts = Parts(Regression(poison_at=poison_at, noise=noise), Rows(rows), Silent())
        optim = Optim(lr=0.1, betas=(beta1, 0.99), warmup=2, weight_decay=0.0, matrices=matrices)
        return Trainer(
            parts,
            optims={"default": optim},
            plan=replace(PLAN, **plan),
            folder=tmp_path / folder,
            tracker=tracker,
        )

    return make


def build_student(*, freeze_text: bool = False) -> TextToVelocity:
    network = WanModel(
        dim=32, ffn_dim=32, heads=2, layers=2, in_channels=12, out_channels=4, text_dim=16, text_length=96
    )
    text_encoder = TextEncoder(
        tokenizer=ByteTokenizer(), length=96, vocab=259, dim=16, ffn_dim=16, heads=2, head_dim=8, layers=1
    )
    return TextToVelocity(network, text_encoder, freeze_text=freeze_text)


@pytest.fixture
def make_student() -> Callable[..., TextToVelocity]:
    """4 latent channels, a network of width 32, a text encoder of width 16."""
    return build_student


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """This process is the first; what it would receive is left as it is."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


NAMES = tuple(f"animal {i}" for i in range(72))


def build_clips(text_encoder: TextEncoder, *, clips: int = 10, count: int = 4, seed: int = 0) -> LatentClips:
    rng = torch.Generator().manual_seed(5)
    latents, image = (torch.randn(clips, 4, 2, 4, 4, generator=rng).bfloat16() for _ in range(2))
    triples = torch.stack([torch.arange(clips) % kinds for kinds in (3, 9, 16)], dim=1)
    return LatentClips(Encoded(triples, latents, image), text_encoder, NAMES, count=count, seed=seed)


@pytest.fixture
def make_clips() -> Callable[..., LatentClips]:
    """Random latents (4, 2, 4, 4) of three subjects in nine motions."""
    return build_clips


@pytest.fixture
def flow(tmp_path: Path) -> Callable[..., Trainer]:
    """Makes a trainer that teaches a new small student ten random latents."""

    def make(folder: str, **plan: float) -> Trainer:
        torch.manual_seed(0)
        student = build_student()
        parts = Parts(
            FlowMatching(student, times=LogNormal(1.1, 1.4)),
            build_clips(student.text_encoder),
            Silent(),
        )
        optims = {"default": Optim(lr=1e-2, warmup=2)}
        return Trainer(parts, optims=optims, plan=replace(PLAN, **plan), folder=tmp_path / folder)

    return make
