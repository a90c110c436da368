"""How often people prefer which variant, with intervals over groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..statistics import by_group, estimate
from .votes import Vote

_SCORES = {"a": 1.0, "tie": 0.5, "b": 0.0}


@dataclass(frozen=True)
class Preference:
    """How two variants compare.

    Attributes:
        wins_a, wins_b, ties: votes.
        rate: how often a is preferred, a tie as half a win; mean over groups.
        low, high: its 95% bootstrap interval over groups.
        votes, groups: how many.
    """

    label_a: str
    label_b: str
    wins_a: int
    wins_b: int
    ties: int
    rate: float
    low: float
    high: float
    votes: int
    groups: int


def preferences(votes: Sequence[Vote], labels: Sequence[str]) -> list[Preference]:
    """Win rates of all pairs of labels that were voted for.

    Args:
        labels: of the run, in its order.
    """
    by_labels: dict[tuple[str, str], list[Vote]] = {}
    for vote in votes:
        by_labels.setdefault((vote.label_a, vote.label_b), []).append(vote)
    order = {label: number for number, label in enumerate(labels)}
    last = len(order)
    return [
        _preference(*two, by_labels[two])
        for two in sorted(by_labels, key=lambda two: [order.get(label, last) for label in two])
    ]


def _preference(label_a: str, label_b: str, votes: list[Vote]) -> Preference:
    winners = [vote.winner for vote in votes]
    groups = by_group([vote.group for vote in votes], [_SCORES[winner] for winner in winners])
    rate = estimate(list(groups.values()))
    return Preference(
        label_a,
        label_b,
        winners.count("a"),
        winners.count("b"),
        winners.count("tie"),
        rate.value,
        rate.low,
        rate.high,
        len(votes),
        len(groups),
    )
