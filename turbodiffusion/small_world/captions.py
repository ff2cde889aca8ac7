"""Captions: every one names the subject, the motion and the background, in one of 24 phrasings."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turbodiffusion.errors import UserError
from turbodiffusion.small_world.clips import Scenes
from turbodiffusion.small_world.split import BACKGROUNDS, MOTIONS, triples
from turbodiffusion.small_world.sprites import subject_names

# {where}: the preposition that suits the motion
_SENTENCES = (
    "{subject} {moves} {where} {background}",
    "{subject} {moves} in front of {background}",
    "over {background}, {subject} {moves}",
    "{background} with {subject} that {moves}",
    "{subject} {moves}, {background} behind it",
    "against {background}, {subject} {moves}",
)
_VERBS = {
    "still": ("stays still", "does not move", "stands still", "stays in place"),
    "left": ("drifts left", "moves left", "slides to the left", "glides left"),
    "right": ("drifts right", "moves right", "slides to the right", "glides right"),
    "up": ("rises", "moves up", "floats up", "climbs upward"),
    "down": ("sinks", "moves down", "floats down", "descends"),
    "grow": ("grows", "gets bigger", "becomes larger", "comes closer"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller", "moves away"),
    "circle": ("circles", "moves in a circle", "goes around in a circle", "travels in circles"),
    "bounce": ("bounces", "hops up and down", "jumps up and down", "keeps bouncing"),
}
PHRASINGS = len(_SENTENCES) * 4
# letters lie: a unicorn begins with a consonant's sound
_SOUNDS_LIKE_CONSONANT = ("uni",)


@dataclass(frozen=True)
class Prompt:
    """A caption and what it says, as numbers."""

    text: str
    subject: int
    motion: int
    background: int


def with_article(noun: str) -> str:
    """The noun after "a" or "an"."""
    is_vowel = noun[0] in "aeiou" and not noun.startswith(_SOUNDS_LIKE_CONSONANT)
    return f"{'an' if is_vowel else 'a'} {noun}"


def caption(subject: str, motion: int, background: int, phrasing: int = 0) -> str:
    """Describe a clip; phrasing in [0, 24): 6 sentences times 4 verbs, 0 being the plainest."""
    if not 0 <= phrasing < PHRASINGS:
        raise UserError(f"phrasing {phrasing} does not exist; choose 0 to {PHRASINGS - 1}")
    verb, sentence = divmod(phrasing, len(_SENTENCES))
    is_flat = "gradient" not in BACKGROUNDS[background]
    return _SENTENCES[sentence].format(
        subject=with_article(subject),
        moves=_VERBS[MOTIONS[motion]][verb],
        where="across" if MOTIONS[motion] in ("left", "right") else "over",
        background=with_article(BACKGROUNDS[background] + " background" * is_flat),
    )


def captions(scenes: Scenes, names: Sequence[str], phrasings: Tensor) -> list[str]:
    """One caption a scene; phrasings (B,) int64 in [0, 24)."""
    attributes = torch.stack((scenes.motion, scenes.background, phrasings), dim=1).tolist()
    subjects = scenes.subject.tolist()
    return [caption(names[s], *numbers) for s, numbers in zip(subjects, attributes, strict=True)]


def held_out_prompts(count: int, split: str = "held_out_combinations") -> list[Prompt]:
    """Distinct triples that training never shows, in a fixed shuffled order, each in one of the phrasings."""
    allowed = triples(split)
    if not 0 <= count <= len(allowed):
        raise UserError(f"count={count} distinct prompts were asked for; {split} has {len(allowed)}")
    generator = torch.Generator().manual_seed(0)
    chosen = allowed[torch.randperm(len(allowed), generator=generator)[:count]].tolist()
    phrasings = torch.randint(PHRASINGS, (len(allowed),), generator=generator).tolist()
    names = subject_names()
    return [
        Prompt(caption(names[s], m, b, phrasing), s, m, b)
        for (s, m, b), phrasing in zip(chosen, phrasings[:count], strict=True)
    ]
