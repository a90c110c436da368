"""Groups of pictures to evaluate on, with captions."""

from __future__ import annotations

from dataclasses import dataclass

from ..training.records import PictureSource


@dataclass(frozen=True)
class GroupPicture:
    """One picture of a group.

    Attributes:
        caption: what the picture shows, without what the group has in common; may be empty.
        licence: of the picture, where it is known.
    """

    source: PictureSource
    caption: str = ""
    licence: str = ""


@dataclass(frozen=True)
class ReferenceGroup:
    """Pictures that have something in common.

    Attributes:
        name: unique in the set.
        split: "held_in" (pictures or groups that methods may be trained on), "held_out", or empty.
        kind: of what they share, such as "character" or "style"; may be empty.
        target: index of the picture to generate; None lets the protocol choose.
        prompts: to be used instead of the target's caption, as in DreamBooth's protocol.
    """

    name: str
    pictures: tuple[GroupPicture, ...]
    split: str = ""
    kind: str = ""
    target: int | None = None
    prompts: tuple[str, ...] = ()
