"""Votes on the disk, and what they add up to."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.rating.preferences import preferences
from easyref_core.evaluation.rating.votes import Vote, VoteFile, matching

VOTE = Vote("p", "group", "a prompt", 3, "a", "b", "a", "b", "01", "02", "ana", "2026-01-01")


@pytest.fixture
def file(tmp_path: Path) -> VoteFile:
    return VoteFile(tmp_path / "votes.jsonl")


def test_votes_come_back_as_they_were_given(file: VoteFile) -> None:
    votes = [VOTE, replace(VOTE, pair="q", winner="tie"), replace(VOTE, rater="bo")]
    for vote in votes:
        file.add(vote)
    assert file.read().counted == tuple(votes)
    assert VoteFile(file.path.with_name("none")).read().counted == ()


def test_a_vote_that_was_taken_back_is_not_counted_and_may_be_given_again(file: VoteFile) -> None:
    other = replace(VOTE, pair="q")
    file.add(VOTE)
    file.add(other)
    file.add(VOTE, taken_back=True)
    assert file.read().counted == (other,)
    again = replace(VOTE, winner="b")
    file.add(again)
    assert file.read().counted == (other, again)


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_damaged_last_line_costs_no_other(file: VoteFile, cut: int) -> None:
    for name in ("p", "q"):
        file.add(replace(VOTE, pair=name))
    content = file.path.read_bytes()
    file.path.write_bytes(content[:-cut])
    found = file.read()
    whole = cut == 1  # only the end of the line is missing
    assert [vote.pair for vote in found.counted] == (["p", "q"] if whole else ["p"])
    assert found.damaged == (0 if whole else 1)
    file.add(replace(VOTE, pair="r"))
    assert [vote.pair for vote in file.read().counted][-1] == "r"


@pytest.mark.parametrize(
    "changed",
    [
        {"winner": "c"},
        {"left": 1},
        {"seed": "x"},
        {"seed": float("nan")},
        {"group": None},
        {"rater": "x" * 20_000},
    ],
)
def test_lines_that_are_no_votes_are_counted_as_damaged(
    file: VoteFile, changed: dict[str, Any]
) -> None:
    file.add(VOTE)
    line = json.loads(file.path.read_text())
    lines = [json.dumps(line | changed), "[]", "\xff", "{" * 1000, json.dumps(line)]
    file.path.write_text("\n".join(lines), encoding="latin-1")
    found = file.read()
    assert (found.counted, found.damaged) == ((VOTE,), 4)


def test_a_vote_that_cannot_be_written_leaves_nothing(
    file: VoteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.add(VOTE)
    before = file.path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EasyRefError, match="No space left"):
        file.add(replace(VOTE, pair="q"))
    assert file.path.read_bytes() == before


def test_votes_for_other_images_are_set_aside() -> None:
    votes = [VOTE, replace(VOTE, image_a="03"), replace(VOTE, pair="gone")]
    assert matching(votes, {"p": ("01", "02")}) == ([VOTE], 2)


def vote(group: str, winner: str, labels: tuple[str, str] = ("a", "b")) -> Vote:
    return replace(VOTE, group=group, winner=winner, label_a=labels[0], label_b=labels[1])


def test_a_win_rate_is_a_mean_over_groups_and_a_tie_half_a_win() -> None:
    votes = [vote("g", "a"), vote("g", "a"), vote("g", "a"), vote("h", "b"), vote("i", "tie")]
    (found,) = preferences(votes, ["a", "b"])
    assert (found.wins_a, found.wins_b, found.ties, found.votes, found.groups) == (3, 1, 1, 5, 3)
    assert found.rate == pytest.approx(0.5)  # of 1, 0 and 0.5
    assert found.low == pytest.approx(0)
    assert found.high == pytest.approx(1)


def test_the_interval_is_narrower_the_more_groups_agree() -> None:
    few = [vote(f"g{n}", "b" if n % 4 == 0 else "a") for n in range(8)]
    many = [vote(f"g{n}", "b" if n % 4 == 0 else "a") for n in range(80)]
    (of_few,), (of_many,) = preferences(few, []), preferences(many, [])
    assert of_few.rate == of_many.rate == 0.75
    assert of_many.high - of_many.low < 0.5 * (of_few.high - of_few.low)
    assert of_many.low > 0.5
    # More votes in the same groups say nothing of other groups.
    (repeated,) = preferences(few * 10, [])
    assert (repeated.low, repeated.high) == (of_few.low, of_few.high)


def test_pairs_stand_in_the_order_of_the_run() -> None:
    votes = [vote("g", "a", two) for two in (("b", "c"), ("a", "c"), ("a", "b"))]
    found = [(each.label_a, each.label_b) for each in preferences(votes, ["a", "b", "c"])]
    assert found == [("a", "b"), ("a", "c"), ("b", "c")]
