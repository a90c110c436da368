"""A folder as `easyref bench` leaves it, by the engine's own writers: made-up scores, small real
pictures.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageEnhance, ImageOps

from easyref_core.evaluation.groups import GroupPicture
from easyref_core.evaluation.metrics import Column
from easyref_core.evaluation.plain_trials import plain_trial
from easyref_core.evaluation.store import TrialState
from easyref_core.evaluation.table import plain_column, rows_of, summaries
from easyref_core.evaluation.trials import Trial, Variant
from easyref_core.training.records import PictureSource

PICTURES = Path(__file__).resolve().parents[1] / "demo" / "references"
SUBJECTS = ("square", "star", "flower", "checks", "drop_with_friends", "triangle_with_friends")
HUNDRED = ("100 x cosine", 100.0)
COLUMNS = (
    Column("clip_i", "CLIP-I", "cosine", printed=(HUNDRED,)),
    Column("clip_t", "CLIP-T", "cosine", printed=(("2.5 x cosine", 2.5), HUNDRED)),
    Column("clip_nearest", "CLIP-I, nearest reference", "cosine", None, (HUNDRED,)),
    Column("dino_i", "DINO-I", "cosine", printed=(HUNDRED,)),
    Column("copied", "Copied", "share of images", False),
)
BASES = {  # CLIP-I, DINO-I, CLIP-T
    "easyref": (0.833, 0.614, 0.284),
    "average": (0.818, 0.584, 0.275),
    "concatenate": (0.821, 0.579, 0.277),
    "ip-adapter": (0.795, 0.579, 0.258),
    "lora": (0.788, 0.561, 0.286),
    "none": (0.702, 0.402, 0.301),
}
TABLE = tuple(Variant(method) for method in BASES)
WEIGHTS = (*(Variant("easyref", weight=w) for w in (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)), Variant("none"))
REFERENCES = (
    *(Variant(m, references=n) for m in tuple(BASES)[:4] for n in (1, 2, 4, 8, 16)),
    Variant("none"),
)
PREFERENCES = (
    {"label_a": "easyref", "label_b": "ip-adapter", "wins_a": 41, "wins_b": 12, "ties": 7}
    | {"rate": 0.742, "low": 0.63, "high": 0.84, "votes": 60, "groups": 20},
)


def write_run(
    folder: Path,
    variants: Sequence[Variant] = TABLE,
    groups: int = 8,
    images: int = 1,
    side: int = 128,
    references: int = 4,
    failed: Sequence[str] = (),
    **results: Any,
) -> Path:
    """Write a finished run.

    Args:
        images: of each group.
        side: of the generated pictures, in pixels.
        failed: paths of trials that have no image.
        results: replace keys of results.json.
    """
    made = _pictures(folder / "images", side)
    trials = [
        _trial(variant, number, image, references)
        for variant in variants
        for number in range(groups)
        for image in range(images)
    ]
    states = {trial.path: _state(trial, trial.path in failed) for trial in trials}
    scores = {t.path: {} if t.path in failed else _scores(t) for t in trials}
    for trial in trials:
        path = folder / f"{trial.path}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if trial.path not in failed:
            subject = trial.group.rpartition("_")[0]
            path.hardlink_to(made[subject, trial.variant.method])
    content = {
        "settings": {
            "protocol": "mrbench",
            "base": "/srv/private/models/sdxl",
            "seed": 0,
            "steps": 30,
        },
        "methods": {
            v.method: {"adapter": {"file": "easyref.safetensors", "sha256": "0f" * 32}}
            for v in variants
        },
        "metrics": [
            {"name": "clip", "model": "openai/clip-vit-large-patch14", "sha256": "a3" * 32},
            {"name": "dino", "model": "facebook/dinov2-small", "sha256": "7e" * 32},
        ],
        "columns": [plain_column(column) for column in COLUMNS],
        "summaries": summaries(trials, states, scores, COLUMNS),
        "notes": ["The identity of faces is left out: no model was named. Add --faces DIR."],
    }
    (folder / "results.json").write_text(json.dumps(content | results), encoding="utf-8")
    plain = [plain_trial(trial) for trial in trials]
    (folder / "trials.json").write_text(json.dumps(plain), encoding="utf-8")
    rows = rows_of(trials, states, scores)
    with (folder / "scores.csv").open("w", encoding="utf-8", newline="") as file:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return folder


def label_of(variant: Variant) -> str:
    plain = asdict(Variant(variant.method))
    changed = {k: v for k, v in asdict(variant).items() if v != plain[k]}
    return ", ".join([variant.method, *(f"{k} {v}" for k, v in changed.items())])


def _pictures(folder: Path, side: int) -> dict[tuple[str, str], Path]:
    """(subject, method) -> a picture that looks a little different for each method."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for subject in SUBJECTS:
        with Image.open(PICTURES / subject / "2.png") as file:
            picture = file.convert("RGB").resize((side, side))
        for number, method in enumerate(BASES):
            path = found[subject, method] = folder / f"{subject}_{method}.png"
            faded = ImageEnhance.Color(picture).enhance(1.2 - 0.2 * number)
            (ImageOps.mirror(faded) if number % 2 else faded).save(path)
    return found


def _trial(variant: Variant, number: int, image: int, references: int) -> Trial:
    subject = SUBJECTS[number % len(SUBJECTS)]
    group, label = f"{subject}_{number:03}", label_of(variant)
    pictures = [
        GroupPicture(PictureSource(PICTURES / subject / f"{1 + i % 4}.png"), licence="CC0-1.0")
        for i in range(references)
    ]
    return Trial(
        variant=variant,
        label=label,
        path=f"images/{label.replace(', ', '_').replace(' ', '-')}/{group}/{image}",
        group=group,
        split="held_out" if number % 2 else "held_in",
        kind="crowded" if subject.endswith("friends") else "character",
        references=()
        if variant.method == "none"
        else tuple(pictures[: variant.references or None]),
        targets=(pictures[0],),
        prompt=f"a {subject.split('_')[0]} on a beach at noon, seen from the front",
        seed=1000 * number + image,
    )


def _state(trial: Trial, failed: bool) -> TrialState:
    if failed:
        return TrialState("failed", "the device ran out of memory")
    seconds = {"encode": 0.05 + 0.12 * len(trial.references), "sample": 2.1}
    return TrialState(
        "done", "", seconds | ({"train": 210.0} if trial.variant.method == "lora" else {})
    )


def _scores(trial: Trial) -> dict[str, float]:
    chance = random.Random(f"{trial.group} {trial.seed}")  # equal for all variants
    own = random.Random(trial.path)
    clip_i, dino_i, clip_t = BASES.get(trial.variant.method, BASES["easyref"])
    weight, used = trial.variant.weight, bool(trial.references)
    gain = used * 0.03 * (1 - 0.6 ** (len(trial.references) - 1))
    lost = used * (1 - min(weight, 1.3)) ** 2
    noise = [chance.gauss(0, 0.03) + own.gauss(0, 0.01) for _ in range(4)]
    return {
        "clip_i": clip_i + gain - 0.15 * lost + noise[0],
        "clip_t": clip_t + used * 0.03 * (1 - weight) + 0.3 * noise[2],
        "clip_nearest": clip_i + 0.05 + noise[3],
        "dino_i": dino_i + 2 * gain - 0.3 * lost + noise[1],
        "copied": float(own.random() < 0.05),
    }
