"""What the table `layers` is asked: does pooling all of the MLLM's layers help, and how.

The paper is arXiv 2605.26111. Its ablation of layers is most likely measured with the VAE's part
on, which is off here: its numbers do not compare, their order may.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .findings import NONE, OTHER, OWN, Finding, difference, falls_to_chance
from .judge import IDENTITY
from .ordering import Verdict, read_scores

NAMES = {"easyref": "last layer", "lap": "one pool (LAP)", "dla": "two pools (DLA)"}
"""Aggregation -> its name in tables."""
_PROMPT = "clip_t"


def controls(scores: Path, methods: Sequence[str]) -> list[Verdict]:
    """Whether each aggregation's images follow their own group, and not another one's.

    Raises:
        EasyRefError: the file cannot be read.
    """
    rows = read_scores(scores)
    found = []
    for aggregation, name in NAMES.items():
        own, other = ({**m, "aggregation": aggregation, "references": 4} for m in (OWN, OTHER))
        claim = f"{name}: own group > another group on identity"
        found.append(Verdict(claim, difference(rows, own, other), strict=True))
        found.append(falls_to_chance(name, difference(rows, other, NONE)))
    return found


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
    findings = [
        Finding(claim, difference(rows, first, second, column), paper)
        for claim, first, second, column, paper in questions
    ]
    for name, line in (("one pool", lap), ("two pools", dla)):
        for count, said in ((1, "of one reference"), (4, "of four")):
            pair = ({**one, "references": count} for one in (line, last))
            claim = f"{name} above the last layer on identity, {said}"
            findings.append(Finding(claim, difference(rows, *pair)))
        claim = f"{name} above the last layer on identity, crowded references"
        findings.append(Finding(claim, difference(crowded, line, last)))
    return [finding.sentence for finding in findings]
