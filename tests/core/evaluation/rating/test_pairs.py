"""Which images are compared, in which order, on which sides."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.groups import GroupPicture
from easyref_core.evaluation.rating.pairs import (
    Pair,
    is_turned,
    labels_of,
    make_pairs,
    shuffled,
    two_labels,
)
from easyref_core.evaluation.trials import Trial, Variant
from easyref_core.training.records import PictureSource


def trial(label: str, group: str = "g", seed: int = 0, references: int = 0) -> Trial:
    picture = GroupPicture(PictureSource(Path("x.png")))
    return Trial(
        *(Variant("easyref"), label, f"images/{label}/{group}/{seed}", group, "", ""),
        *((picture,) * references, (), "a prompt", seed),
    )


def names(pairs: list[Pair]) -> list[tuple[str, str, str, int]]:
    return [(*pair.labels, pair.first.group, pair.first.seed) for pair in pairs]


MANY = make_pairs([trial(label, seed=n) for label in ("a", "b") for n in range(400)])


def test_all_pairs_of_variants_with_the_same_group_and_seed() -> None:
    trials = [trial(label, group, seed) for label in "zya" for group in "gh" for seed in (1, 2)]
    found = names(make_pairs(trials))
    assert len(found) == 3 * 2 * 2
    assert found[:3] == [("z", "y", "g", 1), ("z", "a", "g", 1), ("y", "a", "g", 1)]
    assert len({pair.key for pair in make_pairs(trials)}) == 12


def test_images_that_are_missing_make_no_pair() -> None:
    trials = [trial("a", seed=1), trial("a", seed=2), trial("b", seed=2), trial("b", seed=3)]
    assert names(make_pairs(trials)) == [("a", "b", "g", 2)]


def test_two_variants_can_be_chosen() -> None:
    trials = [trial(label) for label in ("a", "b", "c")]
    assert names(make_pairs(trials, ("c", "a"))) == [("a", "c", "g", 0)]
    assert labels_of(trials) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a,b", ("a", "b")),
        ("b, a", ("b", "a")),
        ("easyref, weight 0.6,a", ("easyref, weight 0.6", "a")),
        ("a, easyref, weight 0.6", ("a", "easyref, weight 0.6")),
    ],
)
def test_labels_with_commas_are_told_apart(text: str, found: tuple[str, str]) -> None:
    assert two_labels(text, ["a", "b", "easyref, weight 0.6"]) == found


@pytest.mark.parametrize("text", ["a", "a,a", "a,c", "", ","])
def test_labels_that_are_not_in_the_run_are_refused_with_those_that_are(text: str) -> None:
    with pytest.raises(EasyRefError, match=r"two of the run's labels.*'a'; 'b'"):
        two_labels(text, ["a", "b"])


def test_the_order_is_the_same_each_time_and_another_for_each_person() -> None:
    assert shuffled(MANY, "ana") == shuffled(MANY[::-1], "ana")
    assert shuffled(MANY, "ana") != shuffled(MANY, "bo")
    seeds = [pair.first.seed for pair in shuffled(MANY, "")]
    assert sorted(seeds) == list(range(400))
    rising = sum(a < b for a, b in pairwise(seeds))
    assert 160 < rising < 240


def test_about_half_of_the_pairs_are_turned_whatever_their_order() -> None:
    turned = [is_turned(pair, "") for pair in shuffled(MANY, "")]
    assert 160 < sum(turned) < 240
    assert 60 < sum(turned[:200]) < 140
    assert turned != [is_turned(pair, "ana") for pair in shuffled(MANY, "")]


def test_the_longer_list_of_references_is_shown() -> None:
    pair = Pair(trial("a", references=1), trial("b", references=3))
    assert len(pair.references) == 3
