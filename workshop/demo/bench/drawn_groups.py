"""Groups of drawn characters as a folder that `easyref bench` reads.

FOLDER/SPLIT/NAME/00.png          the target: the character alone
FOLDER/SPLIT/NAME/01.png ...      references
FOLDER/SPLIT/NAME/metadata.jsonl  captions, which name the scene only
FOLDER/facts.json                 the options, and group -> attributes that its target shows
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from easyref_core.files import check_place, writing

from ..dataset.characters import Identity
from ..dataset.groups import identity_group
from ..dataset.splits import identities
from ..pretraining.pictures import SIDE
from ..tiny_weights import write_json, write_text

FACTS = "facts.json"
KINDS = ("character", "crowded")
REFERENCES = 16
# Earlier held-out characters served while recipes were developed, or are those of `check`.
_FIRST = {"held_in": 0, "held_out": 400}
_LICENCE = "Apache-2.0"  # as all of the project


@dataclass(frozen=True)
class GroupOptions:
    """
    Attributes:
        groups: of each split and kind.
        references: of each group; one picture more is its target.
        splits: that are drawn.
        side: of the pictures, in pixels.
    """

    groups: int = 8
    references: int = REFERENCES
    side: int = SIDE
    seed: int = 0
    splits: tuple[str, ...] = ("held_in", "held_out")


def write_groups(folder: Path, options: GroupOptions) -> Path:
    """Draw groups of the splits and of both kinds; returns the folder.

    A folder that was drawn with these options is kept.

    In crowded groups a bigger friend, a different one each time, stands beside the character in
    every reference.
    """
    check_place(folder / FACTS)
    chosen = {**asdict(options), "splits": list(options.splits)}
    with suppress(OSError, ValueError, KeyError, TypeError):  # absent or damaged: drawn again
        if json.loads((folder / FACTS).read_text(encoding="utf-8"))["options"] == chosen:
            return folder
    facts = {}
    training, held_out = identities()
    with writing(folder):
        for split in options.splits:
            pool = training if split == "held_in" else held_out
            for place, kind in enumerate(KINDS):
                for number in range(options.groups):
                    name = f"{split}_{kind}_{number:02}"
                    turn = _FIRST[split] + number * len(KINDS) + place
                    identity = pool[turn % len(pool)]
                    friends = training if kind == "crowded" else ()
                    facts[name] = _write_group(
                        folder / split / name, kind, identity, friends, options
                    )
        write_json(folder / FACTS, {"options": chosen, "groups": facts})
    return folder


def read_facts(folder: Path) -> dict[str, dict[str, str]]:
    """Group -> attributes of its character, and of its target's scene."""
    return json.loads((folder / FACTS).read_text(encoding="utf-8"))["groups"]


def _write_group(
    folder: Path,
    kind: str,
    identity: Identity,
    friends: Sequence[Identity],
    options: GroupOptions,
) -> dict[str, str]:
    """Draw one group; returns its target's facts."""
    rng = random.Random(f"bench {options.seed} {folder.name}")
    drawn = identity_group(identity, options.references + 1, options.side, rng, friends)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, image in enumerate(drawn):
        name = f"{number:02}.png"
        image.picture.save(folder / name)
        line = {"file_name": name, "text": image.caption, "licence": _LICENCE, "kind": kind}
        lines.append(json.dumps(line | ({} if number else {"target": True})))
    write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")
    return drawn[0].facts
