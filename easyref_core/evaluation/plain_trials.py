"""Trials as plain JSON, and back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import EasyRefError
from ..training.records import PictureSource
from ..untrusted import inside, number, shown, text, whole_number
from .groups import GroupPicture
from .trials import NEWER, Trial, Variant


def plain_trial(trial: Trial) -> dict[str, Any]:
    """A trial as plain JSON; captions and licences are the references', then the targets'."""
    return {
        "path": trial.path,
        "label": trial.label,
        "variant": dataclasses.asdict(trial.variant),
        "group": trial.group,
        "split": trial.split,
        "kind": trial.kind,
        "prompt": trial.prompt,
        "seed": trial.seed,
        "references": _paths(trial.references),
        "targets": _paths(trial.targets),
        "captions": [picture.caption for picture in (*trial.references, *trial.targets)],
        "licences": [picture.licence for picture in (*trial.references, *trial.targets)],
    }


def _paths(pictures: Iterable[GroupPicture]) -> list[str]:
    return [os.path.abspath(picture.source.path) for picture in pictures]


def trial_from_plain(item: Any, folder: Path) -> Trial:
    """A trial from a file that may be damaged or foreign.

    Args:
        folder: of the run, which the image stays in.

    Raises:
        EasyRefError, TypeError, KeyError: something is missing or of another type.
    """
    inside(folder, text(item["path"], "path") + ".png", "image")
    references, targets = _texts(item, "references"), _texts(item, "targets")
    captions, licences = _texts(item, "captions"), _texts(item, "licences")
    files = [*references, *targets]
    if not len(captions) == len(licences) == len(files):
        raise EasyRefError("captions and licences are not as many as pictures")
    pictures = [
        GroupPicture(PictureSource(Path(file)), caption, licence)
        for file, caption, licence in zip(files, captions, licences, strict=True)
    ]
    names = ("path", "label", "group", "split", "kind", "prompt")
    return Trial(
        _variant(item["variant"]),
        **{name: text(item[name], name) for name in names},
        references=tuple(pictures[: len(references)]),
        targets=tuple(pictures[len(references) :]),
        seed=whole_number(item["seed"], "seed", 0),
    )


def _texts(item: Any, name: str) -> list[str]:
    if not isinstance(item[name], list):
        raise EasyRefError(f"{name} is {shown(item[name])}; it must be a list.")
    return [text(value, name) for value in item[name]]


def _variant(item: Any) -> Variant:
    checks = dict.fromkeys(("method", "adapter", "aggregation", "stages"), text)
    checks |= dict.fromkeys(("weight", "guidance", "identity"), number)
    given = {**NEWER, **item}
    return Variant(
        **{
            field.name: checks.get(field.name, whole_number)(given[field.name], field.name)
            for field in dataclasses.fields(Variant)
        }
    )
