"""Training the small world's text encoder before there are videos: it learns to read what captions say.

The published models start from a language model; a network that starts from random bytes instead spends most
of its training on finding the words.  Shapes: B captions, S tokens, E width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.objective import OneNetwork, Product, Watch, seed_of
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.tokenizers import PAD
from turbodiffusion.small_world.captions import PHRASINGS, caption
from turbodiffusion.small_world.split import BACKGROUNDS, MOTIONS, SUBJECTS, triples
from turbodiffusion.small_world.sprites import subject_names

ATTRIBUTES = {"subject": SUBJECTS, "motion": len(MOTIONS), "background": len(BACKGROUNDS)}


@dataclass(frozen=True)
class Captions:
    """Token ids (B, S) and the (subject, motion, background) they state (B, 3) int64."""

    tokens: Tensor
    triples: Tensor


@dataclass(frozen=True)
class CaptionStream:
    """Endless captions of a split's triples, each in a phrasing drawn anew."""

    text_encoder: TextEncoder
    count: int
    seed: int
    split: str = "train"

    def batch(self, number: int) -> Captions:
        generator = torch.Generator().manual_seed(seed_of(self.split, self.seed, number))
        allowed, names = triples(self.split), subject_names()
        chosen = allowed[torch.randint(len(allowed), (self.count,), generator=generator)]
        phrasings = torch.randint(PHRASINGS, (self.count,), generator=generator).tolist()
        texts = [
            caption(names[subject], motion, background, phrasing)
            for (subject, motion, background), phrasing in zip(chosen.tolist(), phrasings, strict=True)
        ]
        device = self.text_encoder.encoder.embed_tokens.weight.device
        return Captions(self.text_encoder.tokenize(texts)[0].to(device), chosen.to(device))


class Reader(nn.Module):
    """A text encoder and one linear reading of its mean state for each attribute."""

    def __init__(self, text_encoder: TextEncoder):
        super().__init__()
        self.text_encoder = text_encoder
        width = text_encoder.config["dim"]
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in ATTRIBUTES.items()})

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Ids (B, S) -> logits (B, count) of every attribute."""
        mask = tokens != PAD
        mean = self.text_encoder.encode(tokens, mask).sum(1) / mask.sum(1, keepdim=True)
        return [head(mean.float()) for head in self.heads.values()]


@dataclass(frozen=True)
class CaptionReading(OneNetwork):
    """Cross-entropy of the three attributes, summed."""

    reader: nn.Module

    role = "reader"

    def losses(
        self, batch: Captions, step: int, rng: torch.Generator, watch: Watch
    ) -> Iterator[tuple[str, Tensor]]:
        logits = self.reader(batch.tokens)
        parts = [F.cross_entropy(row, batch.triples[:, i], reduction="none") for i, row in enumerate(logits)]
        yield "reading", sum(parts)


@dataclass(frozen=True)
class ReaderOutcome:
    """Share of captions of held-out combinations read rightly, and the encoder without its heads."""

    held_out: CaptionStream
    batches: int
    name: str

    @torch.no_grad()
    def measure(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        right = []
        for batch in map(self.held_out.batch, range(self.batches)):
            read = torch.stack([row.argmax(1) for row in networks["reader"](batch.tokens)], dim=1)
            right.append(read == batch.triples)
        shares = torch.cat(right).float().mean(0).tolist()
        return dict(zip((f"held_out/{name}" for name in ATTRIBUTES), shares, strict=True))

    def verdict(self, measures: dict[str, float]) -> str:
        shares = ", ".join(f"the {name} of {measures[f'held_out/{name}']:.0%}" for name in ATTRIBUTES)
        return f"in captions of combinations it never saw, it reads {shares}"

    def preview(self, networks: dict[str, nn.Module]) -> None:
        """There is nothing to look at."""

    def products(self, networks: dict[str, nn.Module]) -> list[Product]:
        return [Product(self.name, networks["reader"].text_encoder)]
