import pytest
import torch

from turbodiffusion.errors import UserError
from turbodiffusion.small_world.captions import PHRASINGS, caption, captions, held_out_prompts, with_article
from turbodiffusion.small_world.clips import draw_scenes
from turbodiffusion.small_world.split import BACKGROUNDS, COLORS, MOTIONS, triples
from turbodiffusion.small_world.sprites import subject_names

ORANGE, TEAL = COLORS.index("orange"), COLORS.index("teal")


def test_plainest_captions_read_naturally() -> None:
    drifts = caption("octopus", MOTIONS.index("left"), TEAL)
    grows = caption("rocket", MOTIONS.index("grow"), ORANGE + len(COLORS))
    assert drifts == "an octopus drifts left across a teal background"
    assert grows == "a rocket grows over an orange gradient"


def test_articles_follow_the_sound() -> None:
    nouns = ("owl", "umbrella", "orange gradient", "unicorn", "bus", "elephant")
    assert [with_article(noun).split()[0] for noun in nouns] == ["an", "an", "an", "a", "a", "an"]


def test_every_caption_states_subject_and_background_once_and_motions_differ() -> None:
    for phrasing in range(PHRASINGS):
        for background in range(len(BACKGROUNDS)):
            texts = [caption("lion", motion, background, phrasing) for motion in range(len(MOTIONS))]
            assert len(set(texts)) == len(MOTIONS)
            for text in texts:
                assert text.count("lion") == 1
                assert text.count(COLORS[background % len(COLORS)]) == 1
                assert ("gradient" in text) == (background >= len(COLORS))


def test_phrasings_differ() -> None:
    for motion in range(len(MOTIONS)):
        assert len({caption("lion", motion, 0, phrasing) for phrasing in range(PHRASINGS)}) == PHRASINGS


def test_no_two_attributes_share_a_caption_and_all_fit_the_text_encoder() -> None:
    names = subject_names()
    texts = [caption(names[s], m, b) for s, m, b in triples("train").tolist()]
    assert len(set(texts)) == len(texts)
    longest = max(
        len(caption(max(names, key=len), motion, background, phrasing).encode())
        for motion in range(len(MOTIONS))
        for background in range(len(BACKGROUNDS))
        for phrasing in range(PHRASINGS)
    )
    assert longest < 96  # its length, the end mark included


def test_captions_follow_their_scenes() -> None:
    scenes = draw_scenes(5, torch.Generator().manual_seed(1))
    names = subject_names()
    texts = captions(scenes, names, torch.arange(5))
    for i, text in enumerate(texts):
        assert text == caption(names[scenes.subject[i]], int(scenes.motion[i]), int(scenes.background[i]), i)


def test_held_out_prompts_are_distinct_unseen_and_always_the_same() -> None:
    prompts = held_out_prompts(512)
    attributes = [(p.subject, p.motion, p.background) for p in prompts]
    assert len(set(attributes)) == 512
    assert not set(attributes) & {tuple(triple) for triple in triples("train").tolist()}
    assert held_out_prompts(100) == prompts[:100]
    assert len({p.motion for p in prompts[:64]}) == len(MOTIONS)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="phrasing 24 does not exist; choose 0 to 23"):
        caption("lion", 0, 0, PHRASINGS)
    with pytest.raises(UserError, match=r"count=892 .* has 891"):
        held_out_prompts(892)
