"""The drawn groups to evaluate on, with the attributes of their targets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from easyref_core.errors import EasyRefError
from easyref_core.pictures.loading import open_picture

from ..dataset.characters import ATTRIBUTES
from ..dataset.groups import Style, full_caption
from ..pretraining.pictures import read_pixels

REFERENCES = 4
SPLITS = {"held_out": "held_out.json", "training": "groups.json"}


@dataclass(frozen=True)
class Group:
    """A group of pictures with something in common.

    Attributes:
        number: index in the list; seeds its images' noise.
        kind: identity, crowded or style.
        caption: of the target; names the scene, or the shape, only.
        facts: attribute -> value of the target.
    """

    number: int
    kind: str
    caption: str
    facts: dict[str, str]
    target: Path
    references: tuple[Path, ...]

    @property
    def outline(self) -> Path:
        """Edges of the target's figure."""
        return self.target.with_name(self.target.stem + "_outline.png")

    @property
    def look(self) -> Style:
        """The style of a style group; equal for styles that look alike."""
        names = ("pattern", "first", "second", "ground")
        return Style(*(self.facts[name] for name in names)).look

    @property
    def full_caption(self) -> str:
        """Of the target; names the character, or the style, too."""
        return full_caption(self.caption, self.facts)

    @property
    def alone(self) -> tuple[Path, ...]:
        """Images that show the group's own figure only."""
        return (self.target,) if self.kind == "crowded" else (self.target, *self.references)


@dataclass(frozen=True)
class DrawnSplit:
    """One split of a drawn data set."""

    groups: Sequence[Group]
    facts: dict[Path, dict[str, str]]

    def of_kind(self, kind: str) -> list[Group]:
        return [group for group in self.groups if group.kind == kind]

    def first(self, identities: int) -> DrawnSplit:
        """This many identity groups and crowded groups, and half as many style groups.

        Raises:
            EasyRefError: a kind with fewer groups, or a group with too few references.
        """
        counts = {"identity": identities, "crowded": identities, "style": (identities + 1) // 2}
        chosen = [group for kind, n in counts.items() for group in self.of_kind(kind)[:n]]
        for kind, needed in counts.items():
            available = len(self.of_kind(kind))
            if available < needed:
                raise EasyRefError(
                    f"There are {available} {kind} groups; {identities} identities need {needed}. "
                    f"Draw {groups_for(identities)} groups, or choose fewer with --identities."
                )
        for group in chosen:
            if len(group.references) < REFERENCES:
                raise EasyRefError(
                    f"The group of {group.target} has {len(group.references)} references; "
                    f"{REFERENCES} are needed. Draw groups of {REFERENCES + 1} pictures."
                )
        return DrawnSplit(chosen, self.facts)


def groups_for(identities: int) -> int:
    """Groups to draw for this many identity groups: two of five are, and one is a style."""
    return 5 * ((identities + 1) // 2)


def read_split(folder: Path, split: str = "held_out") -> DrawnSplit:
    """Read the groups of a split of a folder that `python -m workshop.demo data` drew.

    Raises:
        EasyRefError: not such a folder.
    """
    try:
        records = _read(folder / SPLITS[split])
        facts = _read(folder / "facts.json")
        groups = [
            Group(
                number,
                record["kind"],
                record["text"][0],
                facts[record["target"]],
                folder / record["target"],
                tuple(folder / name for name in record["image_file"]),
            )
            for number, record in enumerate(records)
        ]
    except (KeyError, IndexError, TypeError) as error:
        raise EasyRefError(
            f"{folder} was not drawn by `python -m workshop.demo data`, or by an older version "
            f"({type(error).__name__}: {error}). Draw it again."
        ) from error
    return DrawnSplit(groups, {folder / name: fact for name, fact in facts.items()})


def strangers(groups: Sequence[Group]) -> list[Group]:
    """For each group another one, whose character has as few attributes in common as possible.

    Each group is chosen once, so that results with strangers' references and with own ones are
    about the same characters.
    """
    others = [*groups[1:], *groups[:1]]

    def cost(group: Group, other: Group) -> int:
        return len(groups) * len(ATTRIBUTES) if group is other else _shared(group, other)

    better = True
    while better:  # ends, because every exchange lowers the total cost
        better = False
        for (a, one), (b, two) in combinations(enumerate(groups), 2):
            current = cost(one, others[a]) + cost(two, others[b])
            if cost(one, others[b]) + cost(two, others[a]) < current:
                others[a], others[b] = others[b], others[a]
                better = True
    return others


def open_pictures(paths: Sequence[Path]) -> list[Image.Image]:
    return [open_picture(path) for path in paths]


def read_outlines(groups: Sequence[Group], side: int) -> torch.Tensor:
    """[B, 3, side, side] uint8

    Raises:
        EasyRefError: a group without one, or of another size.
    """
    for group in groups:
        if not group.outline.is_file():
            raise EasyRefError(f"There is no outline {group.outline}. Draw the data set again.")
    outlines = read_pixels([group.outline for group in groups])
    if outlines.shape[-1] != side:
        raise EasyRefError(
            f"The drawn pictures are {outlines.shape[-1]} pixels wide, but the model set makes "
            f"{side}. Draw the data set with --side {side}."
        )
    return outlines


def _shared(one: Group, other: Group) -> int:
    return sum(one.facts[name] == other.facts[name] for name in ATTRIBUTES)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EasyRefError(
            f"There is no {path} ({error}). Name a folder that the command `data` drew."
        ) from error
    except ValueError as error:
        raise EasyRefError(f"{path} is not JSON ({error}). Draw the data set again.") from error
