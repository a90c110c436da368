"""What the table `stages` is asked: what identity adds, and when tokens and identity should act.

The paper is arXiv 2605.26111; its numbers are of FLUX with a trained VAE part and do not compare,
their order may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import findings
from .findings import OTHER, OWN, Finding
from .judge import IDENTITY, SCENE
from .ordering import Verdict, difference, read_scores

ROWS: Mapping[str, Mapping[str, Any]] = {
    "tokens": {"weight": 1.0, "identity": 0.0, "stages": ""},
    "tokens, half identity": {"weight": 1.0, "identity": 0.5, "stages": ""},
    "tokens and identity": {"weight": 1.0, "identity": 1.0, "stages": ""},
    "tokens, late identity": {"weight": 1.0, "identity": 1.0, "stages": "late"},
    "stages, same noise": {"weight": 1.0, "identity": 1.0, "stages": "noise"},
    "stages, same steps": {"weight": 1.0, "identity": 1.0, "stages": "steps"},
    "identity": {"weight": 0.0, "identity": 1.0, "stages": ""},
}
"""Name of a line -> the fields of `Variant` that make it."""
_PROMPT, _NEAREST, _COPIED = "clip_t", "dino_nearest", "dino_copied"


def line(name: str, method: Mapping[str, str] = OWN) -> dict[str, Any]:
    """The columns of scores.csv that choose a line."""
    fields = ROWS[name]
    return {
        **method,
        "weight": fields["weight"],
        "identity_weight": fields["identity"],
        "stages": fields["stages"],
    }


def controls(scores: Path, methods: Sequence[str]) -> list[Verdict]:
    """Whether each line's images follow their own group, and not another one's.

    Raises:
        EasyRefError: the file cannot be read.
    """
    lines = {name: (line(name), line(name, OTHER)) for name in ROWS}
    return findings.controls(read_scores(scores), methods, lines)


def found(scores: Path) -> list[str]:
    """What the paper says of the VAE's part and of stages, and what is found here, a sentence each.

    Raises:
        EasyRefError: the file cannot be read.
    """
    rows = read_scores(scores)
    tokens, half, both, late, noise, steps, identity = map(line, ROWS)
    questions = {
        IDENTITY: [
            ("identity beside tokens adds identity", both, tokens, "DINO-I .748, .679"),
            ("identity of half weight beside tokens adds identity", half, tokens, ""),
            ("late identity beside tokens adds identity", late, tokens, ""),
            ("identity always above late identity on identity", both, late, ""),
            ("tokens beside identity add identity", both, identity, ""),
            (
                "stages at the same noise above stages at the same steps on identity",
                noise,
                steps,
                "",
            ),
        ],
        _PROMPT: [
            (
                "identity beside tokens costs prompt",
                tokens,
                both,
                "CLIP-T .299 without the VAE, .301 with it",
            ),
            ("identity of half weight beside tokens costs prompt", tokens, half, ""),
            ("late identity beside tokens costs prompt", tokens, late, ""),
            ("stages at the same noise above at the same steps on prompt", noise, steps, ""),
        ],
        SCENE: [("identity beside tokens costs the scene", tokens, both, "")],
        _COPIED: [("identity alone copies more than tokens alone", identity, tokens, "")],
        _NEAREST: [("identity alone nearer to a reference than tokens", identity, tokens, "")],
    }
    for name, staged in (("noise", noise), ("steps", steps)):
        stages = f"stages at the same {name}"
        claim = f"{stages} above both always on identity"
        questions[IDENTITY].append((claim, staged, both, "DINO-I .748 in stages, .691 at tau 0, 0"))
        questions[IDENTITY].append((f"{stages} above tokens alone on identity", staged, tokens, ""))
        claim = f"{stages} below both always on prompt"
        questions[_PROMPT].append((claim, both, staged, "CLIP-T .301 in stages, .304 at tau 0, 0"))
        claim = f"{stages} copy less than both always"
        questions[_COPIED].append((claim, both, staged, "copies less than other methods"))
    return [
        Finding(claim, difference(rows, first, second, column), paper).sentence
        for column, asked in questions.items()
        for claim, first, second, paper in asked
    ]
