"""The demo's references: groups of held-out characters and a style, drawn once and shipped.

    python -m workshop.demo.references     draws demo/references again

No training image shows these characters (`dataset.splits`). They were chosen before there was a
model whose results could have influenced the choice.

    rows.json                 name -> kind, prompt and facts, in the order of the sheet
    NAME/1.png ... 4.png      references
    NAME/outline.png          for the ControlNet: the same character in another pose
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from easyref_core.errors import EasyRefError
from easyref_core.pictures.loading import open_picture

from ..comfyui.find_comfyui import PACK
from .dataset.characters import SHAPES, Identity
from .dataset.groups import Drawn, Style, draw_identity, draw_style, identity_group
from .dataset.scenes import Scene
from .dataset.splits import identities
from .rows import Row

FOLDER = PACK / "demo" / "references"
REFERENCES = 4
_SIDE = 256
_OUTLINE_SIDE = 128  # of the ControlNet's training images


@dataclass(frozen=True)
class Group:
    """What is drawn for a row.

    Attributes:
        shared: what the references have in common.
        scene: what the prompt asks for: a scene, or a shape for a style.
        friends: whether another character stands beside it in each reference.
    """

    name: str
    shared: Identity | Style
    scene: Scene | str
    friends: bool = False

    @property
    def kind(self) -> str:
        if isinstance(self.shared, Style):
            return "style"
        return "crowded" if self.friends else "identity"


GROUPS = (
    Group(
        "flower",
        Identity("flower", "orange", "dots", "goggle", "party hat"),
        Scene("snow", "night"),
    ),
    Group(
        "square",
        Identity("square", "red", "stripes", "beady", "scarf"),
        Scene("desert", "sunset"),
    ),
    Group(
        "star",
        Identity("star", "yellow", "belly", "sleepy", "top hat"),
        Scene("city", "night"),
    ),
    Group(
        "triangle_with_friends",
        Identity("triangle", "teal", "stripes", "single", "antennae"),
        Scene("meadow", "day"),
        friends=True,
    ),
    Group(
        "drop_with_friends",
        Identity("drop", "purple", "belly", "sleepy", "crown"),
        Scene("beach", "sunset"),
        friends=True,
    ),
    Group("checks", Style("checks", "blue", "pink", "yellow"), "star"),
)


def draw_row(group: Group) -> Row:
    """Draw one group; the same every time."""
    rng = random.Random(f"demo {group.name}")
    if isinstance(group.shared, Style):
        shape = str(group.scene)
        others = rng.sample([s for s in SHAPES if s != shape], REFERENCES)
        drawn = [draw_style(group.shared, other, _SIDE, rng) for other in others]
        target = draw_style(group.shared, shape, _OUTLINE_SIDE, rng)
    else:
        assert isinstance(group.scene, Scene)
        drawn = _elsewhere(group.shared, group.scene, group.friends, rng)
        target = draw_identity(group.shared, _OUTLINE_SIDE, rng, scene=group.scene)
    references = tuple(image.picture for image in drawn)
    return Row(group.name, group.kind, target.caption, references, target.outline, target.facts)


def _elsewhere(identity: Identity, scene: Scene, friends: bool, rng: random.Random) -> list[Drawn]:
    """References in four different places, none of them the prompt's."""
    strangers = identities()[0] if friends else ()
    while True:
        group = identity_group(identity, REFERENCES + 1, _SIDE, rng, strangers)[1:]
        places = [image.facts["place"] for image in group]
        times = {image.facts["time"] for image in group}
        if scene.place not in places and len(set(places)) == REFERENCES and len(times) > 1:
            return group


def write_references(folder: Path = FOLDER) -> Path:
    """Draw all groups into a folder; existing files are replaced."""
    listed = {}
    for group in GROUPS:
        row = draw_row(group)
        (folder / row.name).mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(row.references, 1):
            picture.save(folder / row.name / f"{number}.png", optimize=True)
        row.outline.convert("1").save(folder / row.name / "outline.png", optimize=True)
        listed[row.name] = {"kind": row.kind, "prompt": row.prompt, "facts": dict(row.facts)}
    path = folder / "rows.json"
    path.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    return folder


def read_rows(folder: Path = FOLDER) -> tuple[Row, ...]:
    """The shipped groups.

    Raises:
        EasyRefError: a file is missing or broken.
    """
    path = folder / "rows.json"
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        return tuple(
            Row(
                name,
                entry["kind"],
                entry["prompt"],
                tuple(open_picture(folder / name / f"{n}.png") for n in range(1, REFERENCES + 1)),
                open_picture(folder / name / "outline.png"),
                entry["facts"],
            )
            for name, entry in listed.items()
        )
    except (OSError, ValueError, KeyError) as error:
        raise EasyRefError(
            f"{path} cannot be used ({error}). Draw the references again: "
            "python -m workshop.demo.references"
        ) from error


if __name__ == "__main__":
    print(write_references())
