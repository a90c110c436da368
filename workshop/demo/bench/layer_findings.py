"""What the table `layers` is asked: does pooling all of the MLLM's layers help, and how.

The paper is arXiv 2605.26111. Its ablation of layers is most likely measured with the VAE's part
on, which is off here: its numbers do not compare, their order may.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import findings
from .findings import CONTROL_COUNT, OTHER, OWN, Finding
from .judge import IDENTITY
from .ordering import Verdict, difference, read_scores

NAMES = {"easyref": "last layer", "lap": "one pool (LAP)", "dla": "two pools (DLA)"}
"""Aggregation -> its name in tables."""
_PROMPT = "clip_t"


def controls(scores: Path, methods: Sequence[str]) -> list[Verdict]:
    """Whether each aggregation's images follow their own group, and not another one's.

    Raises:
        EasyRefError: the file cannot be read.
    """
    lines = {
        name: tuple(
            {**method, "aggregation": aggregation, "references": CONTROL_COUNT}
            for method in (OWN, OTHER)
        )
        for aggregation, name in NAMES.items()
    }
    return findings.controls(read_scores(scores), methods, lines)


def found(scores: Path) -> list[str]:
    """What the paper says of layers, and what is found here, a sentence each.

    Raises:
        EasyRefError: the file cannot be read.
    """
    rows = read_scores(scores)
    last, lap, dla = ({**OWN, "aggregation": name} for name in ("easyref", "lap", "dla"))
    crowded = [row for row in rows if row["kind"] == "crowded"]
    questions = (
        ("two pools above the last layer on identity", dla, last, IDENTITY, "DINO-I .748, .657"),
        ("one pool above the last layer on identity", lap, last, IDENTITY, "DINO-I .752, .657"),
        ("one pool above two on identity", lap, dla, IDENTITY, "DINO-I .752, .748"),
        ("two pools above one on the prompt", dla, lap, _PROMPT, "CLIP-T .301, .288"),
        ("two pools above the last layer on the prompt", dla, last, _PROMPT, "CLIP-T .301, .289"),
    )
    answers = [
        Finding(claim, difference(rows, first, second, column), paper)
        for claim, first, second, column, paper in questions
    ]
    for name, line in (("one pool", lap), ("two pools", dla)):
        for count, said in ((1, "of one reference"), (4, "of four")):
            pair = ({**one, "references": count} for one in (line, last))
            claim = f"{name} above the last layer on identity, {said}"
            answers.append(Finding(claim, difference(rows, *pair)))
        claim = f"{name} above the last layer on identity, crowded references"
        answers.append(Finding(claim, difference(crowded, line, last)))
    return [finding.sentence for finding in answers]
