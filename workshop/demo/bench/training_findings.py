"""What the table `training` is asked: tokens first and identity second, or both at once.

The paper, arXiv 2605.26111, trains in two stages; the control here trains pools and identity
together, from the same adapter, for as many steps as both stages have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import findings
from .findings import OTHER, OWN, Finding
from .judge import IDENTITY
from .ordering import Row, Verdict, difference, read_scores

NAMES = ("two stages", "one stage")
"""Of the run's adapters, in their order."""
_PARTS = {"tokens": 0.0, "tokens and identity": 1.0}
_PROMPT, _NEAREST = "clip_t", "dino_nearest"


def name_of(adapter: str, adapters: Sequence[str], identity: float) -> str:
    """A line's name.

    Args:
        adapters: those of the run, in their order.
    """
    part = next(part for part, weight in _PARTS.items() if weight == identity)
    return f"{NAMES[adapters.index(adapter)]}, {part}"


def controls(scores: Path, methods: Sequence[str]) -> list[Verdict]:
    """Whether each line's images follow their own group, and not another one's.

    Raises:
        EasyRefError: the file cannot be read.
    """
    rows = read_scores(scores)
    lines = {
        name: ({**OWN, **fields}, {**OTHER, **fields}) for name, fields in _lines(rows).items()
    }
    return findings.controls(rows, methods, lines)


def found(scores: Path) -> list[str]:
    """What two stages of training give, and what one does, a sentence each.

    Raises:
        EasyRefError: the file cannot be read.
    """
    rows = read_scores(scores)
    lines = {name: {**OWN, **fields} for name, fields in _lines(rows).items()}
    questions = (
        ("tokens", "above one on identity", IDENTITY, ""),
        ("tokens", "above one on the prompt", _PROMPT, ""),
        ("tokens and identity", "above one on identity", IDENTITY, "DINO-I .748, .718"),
        ("tokens and identity", "above one on the prompt", _PROMPT, "CLIP-T .301, .297"),
        ("tokens and identity", "nearer to a reference than one", _NEAREST, ""),
    )
    answers = []
    for part, claim, column, paper in questions:
        pair = (lines[f"{name}, {part}"] for name in NAMES)
        found = difference(rows, *pair, column)
        answers.append(Finding(f"two stages {claim}, {part}", found, paper).sentence)
    return answers


def _lines(rows: Sequence[Row]) -> Mapping[str, Mapping[str, Any]]:
    """Name -> the columns of scores.csv that choose a line, whatever its method."""
    own = [row["adapter"] for row in rows if row["method"] == OWN["method"]]
    adapters = [*dict.fromkeys(own)]
    return {
        name_of(adapter, adapters, weight): {"adapter": adapter, "identity_weight": weight}
        for adapter in adapters
        for weight in _PARTS.values()
    }
