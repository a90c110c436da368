"""Which two images are compared, in which order and on which sides. Pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from ...errors import EasyRefError
from ...untrusted import shown
from ..groups import GroupPicture
from ..trials import Trial


@dataclass(frozen=True)
class Pair:
    """Two images of one group, prompt and seed, of two variants.

    Attributes:
        first, second: in the order in which their labels stand in the run.
    """

    first: Trial
    second: Trial

    @cached_property
    def key(self) -> str:
        """Says which pair it is, in every session; and nothing to who reads it."""
        one = self.first
        parts = (one.group, one.prompt, str(one.seed), one.label, self.second.label)
        return _digest("\0".join(parts))

    @property
    def labels(self) -> tuple[str, str]:
        return self.first.label, self.second.label

    @property
    def references(self) -> tuple[GroupPicture, ...]:
        """Those of the one that got more: fewer are the first of them."""
        return max(self.first.references, self.second.references, key=len)


def make_pairs(trials: Sequence[Trial], compared: tuple[str, str] | None = None) -> list[Pair]:
    """All pairs of variants that have an image for the same group, prompt and seed.

    Args:
        trials: those whose image is there.
        compared: only these two labels.
    """
    alike: dict[tuple[str, str, int], list[Trial]] = {}
    order = {label: number for number, label in enumerate(labels_of(trials))}
    for trial in trials:
        if compared is None or trial.label in compared:
            alike.setdefault((trial.group, trial.prompt, trial.seed), []).append(trial)
    pairs = []
    for same in alike.values():
        by_label = {trial.label: trial for trial in same}
        chosen = sorted(by_label.values(), key=lambda trial: order[trial.label])
        pairs += [Pair(*two) for two in combinations(chosen, 2)]
    return pairs


def labels_of(trials: Iterable[Trial]) -> list[str]:
    """The labels of a run, in its order."""
    return list(dict.fromkeys(trial.label for trial in trials))


def shuffled(pairs: Iterable[Pair], rater: str) -> list[Pair]:
    """In an order that looks random, and is the same each time for one rater."""
    return sorted(pairs, key=lambda pair: _digest(f"order\0{rater}\0{pair.key}"))


def is_turned(pair: Pair, rater: str) -> bool:
    """Whether the first stands on the right; for half of the pairs, the same each time."""
    return int(_digest(f"side\0{rater}\0{pair.key}")[:8], 16) % 2 == 1


def two_labels(text: str, labels: Sequence[str]) -> tuple[str, str]:
    """The two labels of `--compare A,B`; a label may hold commas itself.

    Raises:
        EasyRefError: not two of the run's labels.
    """
    parts = text.split(",")
    for cut in range(1, len(parts)):
        one, two = ",".join(parts[:cut]).strip(), ",".join(parts[cut:]).strip()
        if one in labels and two in labels and one != two:
            return one, two
    known = "; ".join(shown(label) for label in labels[:20])
    raise EasyRefError(
        f"--compare is {shown(text)}; it must be two of the run's labels, as A,B. They are: "
        f"{known}."
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
