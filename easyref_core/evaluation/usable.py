"""Which pictures and groups can be used: every picture is decoded once, and its pixels' checksum
is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import EasyRefError
from ..files import write_atomically
from ..untrusted import escaped, read_json, shown
from .groups import GroupPicture, ReferenceGroup
from .planning import Pairing

_LARGEST_INDEX = 256_000_000  # bytes
_NAMED = 3  # groups or pictures that a note names


class PictureIndex:
    """Checksums of pictures' pixels, kept in a file so that a resumed run decodes nothing again.

    Args:
        file: where they are kept; None for nowhere.

    Attributes:
        changed: pictures that show something else than when they were kept.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.changed: list[str] = []
        self._file = file
        self._known: dict[str, dict[str, str]] = {}
        if file is not None and file.exists():
            try:
                content = read_json(file, _LARGEST_INDEX)
            except EasyRefError:  # damaged: they are decoded again
                content = {}
            if isinstance(content, dict):
                self._known = {name: known for name, known in content.items() if _is_known(known)}

    def pixels(self, picture: GroupPicture) -> str:
        """SHA-256 of the decoded picture's size and pixels.

        Raises:
            EasyRefError: missing or broken.
        """
        source = picture.source
        try:
            mark = source.fingerprint()
        except (OSError, ValueError):
            source.open()  # says what is wrong
            raise EasyRefError(f"{source} cannot be read.") from None
        known = self._known.get(str(source))
        if known is None or known["mark"] != mark:
            image = source.open()
            digest = hashlib.sha256(f"{image.width} {image.height} ".encode())
            digest.update(image.tobytes())
            pixels = digest.hexdigest()
            if known is not None and known["pixels"] != pixels:
                self.changed.append(f"the picture {source}")
            known = {"mark": mark, "pixels": pixels}
            self._known[str(source)] = known
        return known["pixels"]

    def save(self) -> None:
        """
        Raises:
            OSError: it cannot be written.
        """
        if self._file is not None:
            text = json.dumps(self._known)
            write_atomically(self._file, lambda file: file.write_text(text, encoding="utf-8"))


def _is_known(entry: Any) -> bool:
    """Whether an entry of the file is whole."""
    return isinstance(entry, dict) and all(
        isinstance(entry.get(name), str) for name in ("mark", "pixels")
    )


def usable_groups(
    groups: Sequence[ReferenceGroup],
    pairing: Pairing,
    index: PictureIndex,
    notes: list[str],
    show: Callable[[int], object] = lambda count: None,
) -> list[ReferenceGroup]:
    """Groups without pictures that cannot be read or that show the same as another of the group,
    and without groups that are too small then.

    Args:
        notes: gets a sentence for everything that is left out, and for missing captions.
        show: called with the number of groups that are read.

    Raises:
        EasyRefError: no group can be used.
    """
    found = []
    small: list[str] = []
    empty: list[str] = []
    without_caption: list[str] = []
    least = 2 if pairing == "others" else 1
    for group in groups:
        show(1)
        group = _without_bad_pictures(group, index, notes)
        if not group.pictures:
            empty.append(group.name)
        elif len(group.pictures) < least:
            small.append(group.name)
        else:
            found.append(group)
            if not group.prompts and not all(p.caption for p in _possible_targets(group)):
                without_caption.append(group.name)
    _note(notes, empty, "hold no pictures that can be read, and are left out")
    _note(notes, small, "hold a single picture, which leaves no reference, and are left out")
    _note(notes, without_caption, "have pictures without a caption; they are prompted with nothing")
    if not found:
        said = f" {notes[-1]}" if notes else ""
        needed = "two pictures" if least == 2 else "one picture"
        raise EasyRefError(
            f"None of the {len(groups)} groups can be used.{said} A group needs at least {needed} "
            "that can be read and that differ."
        )
    return found


def _possible_targets(group: ReferenceGroup) -> Sequence[GroupPicture]:
    return group.pictures if group.target is None else (group.pictures[group.target],)


def _note(notes: list[str], names: Sequence[str], what: str) -> None:
    if names:
        listed = ", ".join(shown(name) for name in names[:_NAMED])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        notes.append(f"Groups that {what}: {listed}{more}.")


def _without_bad_pictures(
    group: ReferenceGroup, index: PictureIndex, notes: list[str]
) -> ReferenceGroup:
    """The group with what can be used. Of equal pictures the first stays, or the fixed target."""
    order = list(range(len(group.pictures)))
    if group.target is not None:
        order.remove(group.target)
        order.insert(0, group.target)
    kept: dict[str, int] = {}  # pixels -> picture
    for number in order:
        picture = group.pictures[number]
        try:
            pixels = index.pixels(picture)
        except EasyRefError as error:
            notes.append(f"Group {shown(group.name)}: a picture is left out. {error}")
            continue
        if pixels in kept:
            same = group.pictures[kept[pixels]].source.path.name
            notes.append(
                f"Group {shown(group.name)}: {shown(picture.source.path.name)} shows the same as "
                f"{shown(same)} and is left out."
            )
            continue
        kept[pixels] = number
    stays = sorted(kept.values())
    target = group.target
    if target is not None:
        if target not in stays:  # nothing to compare with
            notes.append(f"Group {escaped(group.name)}: its target cannot be read.")
            return replace(group, pictures=(), target=None)
        target = stays.index(target)
    return replace(group, pictures=tuple(group.pictures[n] for n in stays), target=target)
