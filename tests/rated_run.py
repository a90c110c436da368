"""A finished run, small enough to be compared by hand: each variant has a colour of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from easyref_core.evaluation.groups import GroupPicture
from easyref_core.evaluation.methods import Generated
from easyref_core.evaluation.plain_trials import plain_trial
from easyref_core.evaluation.store import RunFolder
from easyref_core.evaluation.trials import Trial, Variant
from easyref_core.training.records import PictureSource

REFERENCES = Path(__file__).resolve().parents[1] / "demo" / "references"
SUBJECTS = ("square", "star", "flower", "checks")
COLOURS = ("tomato", "steelblue", "goldenrod", "orchid")


def variants(*labels: str) -> list[tuple[str, Variant]]:
    return [(label, Variant("easyref", weight=n / 8)) for n, label in enumerate(labels, 1)]


def write_rated_run(
    folder: Path,
    labels: Sequence[str] = ("easyref", "none"),
    groups: int = 4,
    images: int = 1,
    side: int = 96,
    unlike: Sequence[tuple[str, int]] = (),
) -> Path:
    """Write it.

    Args:
        images: of each group.
        unlike: (label, group's number) whose image failed.
    """
    run = RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run.write_json("run.json", {"settings": {}, "methods": {}, "metrics": [], "version": 1})
    trials = []
    for number, (label, variant) in enumerate(variants(*labels)):
        for group in range(groups):
            for image in range(images):
                trial = _trial(f"{number}/{group}/{image}", label, variant, group, image)
                trials.append(trial)
                done = (label, group) not in unlike
                drawn = _image(number, group, side) if done else None
                run.save(trial, Generated(drawn, {}, "" if done else "not enough memory"))
    run.write_json("trials.json", [plain_trial(trial) for trial in trials])
    results = {"settings": {}, "methods": {}, "metrics": [], "columns": [], "summaries": []}
    run.write_json("results.json", {**results, "notes": ["kept"]})
    return folder


def _trial(path: str, label: str, variant: Variant, group: int, image: int) -> Trial:
    subject = SUBJECTS[group % len(SUBJECTS)]
    pictures = tuple(
        GroupPicture(PictureSource(REFERENCES / subject / f"{n}.png")) for n in range(1, 5)
    )
    return Trial(
        variant,
        label,
        f"images/{path}",
        *(f"{subject} {group}", "held_out", "character"),
        references=() if label == "none" else pictures[:3],
        targets=pictures[3:],
        prompt=f"the {subject} on a beach at noon",
        seed=1000 * group + image,
    )


def _image(variant: int, group: int, side: int) -> Image.Image:
    picture = Image.new("RGB", (side, side), COLOURS[variant % len(COLOURS)])
    draw = ImageDraw.Draw(picture)
    draw.ellipse([side / 4, side / 4, side * (3 + group % 4) / 8, side * 0.75], fill="white")
    return picture


def lines_of(folder: Path) -> list[dict[str, object]]:
    """The votes as they stand in the file."""
    return [json.loads(line) for line in (folder / "votes.jsonl").read_text().splitlines()]
