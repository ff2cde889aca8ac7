import itertools

import pytest
import torch

from turbodiffusion.errors import UserError
from turbodiffusion.small_world.clips import draw_scenes
from turbodiffusion.small_world.split import BACKGROUNDS, MOTIONS, SEEN, SPLITS, SUBJECTS, triples


def test_splits_are_disjoint_and_together_everything() -> None:
    sets = [{tuple(triple) for triple in triples(split).tolist()} for split in SPLITS]
    assert all(not a & b for a, b in itertools.combinations(sets, 2))
    assert set.union(*sets) == set(
        itertools.product(range(SUBJECTS), range(len(MOTIONS)), range(len(BACKGROUNDS)))
    )


def test_a_tenth_of_the_seen_combinations_is_held_out() -> None:
    held_out, train = len(triples("held_out_combinations")), len(triples("train"))
    # 9216 fair draws at 10 %: standard deviation 0.3 %; three of them
    assert held_out / (held_out + train) == pytest.approx(0.1, abs=0.01)


def test_every_attribute_value_is_trained_and_is_held_out() -> None:
    for split in ("train", "held_out_combinations"):
        for column, count in enumerate((SEEN, len(MOTIONS), len(BACKGROUNDS))):
            assert triples(split)[:, column].unique().tolist() == list(range(count))


def test_the_split_never_changes() -> None:
    # recorded when the shipped networks were trained: another split would show them what they are tested on
    assert triples("held_out_combinations")[:3].tolist() == [[0, 0, 7], [0, 0, 10], [0, 3, 3]]
    assert [len(triples(split)) for split in SPLITS] == [8325, 891, 1152]


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_come_from_their_split(split: str) -> None:
    scenes = draw_scenes(500, torch.Generator().manual_seed(0), split)
    drawn = set(zip(scenes.subject.tolist(), scenes.motion.tolist(), scenes.background.tolist(), strict=True))
    assert drawn <= {tuple(triple) for triple in triples(split).tolist()}


def test_unknown_split_is_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match="no split 'test'; choose one of train, held_out"):
        triples("test")
