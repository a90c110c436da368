"""The drawn data set on disk, in the layout that `easyref train` reads.

training/ held_out/     images, outlines beside them
groups.json             training groups: references, captions of the scene only, target
single.json             each group's target as its own reference
captions.json           all images of one figure with captions, two of three naming it
held_out.json           groups of identities that no training image shows, not even as a friend
facts.json              image -> attributes, to evaluate with
overview.png            a few groups of each kind
"""

from __future__ import annotations

import json
import os
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic.dataclasses import dataclass

from easyref_core.errors import EasyRefError
from easyref_core.files import check_place, writing
from easyref_core.training.recipe import STRICT, Int

from .groups import Drawn, Style, identity_group, style_group
from .splits import identities, styles

KINDS = ("identity", "crowded", "style")
_SHOWN = 3  # groups of a kind in the overview
_GAP = 6
_LARGEST = 1024  # pixels


@dataclass(frozen=True, config=STRICT)
class DatasetOptions:
    """Size and seed of a data set.

    Attributes:
        groups, held_out_groups: of each split; two fifths identity, two fifths crowded, a fifth
            style.
        pictures: images per group, its target included.
        side: of the square images, in pixels.
        seed: the same one draws the same files.
        first_held_out: index of the first held-out group. The index decides which character a group
            shows, the seed how.
    """

    groups: Int = 1000
    held_out_groups: Int = 400
    pictures: Int = 5
    side: Int = 128
    seed: Int = 0
    first_held_out: Int = 0


def write_dataset(folder: str | Path, options: DatasetOptions, workers: int | None = None) -> Path:
    """Draw the data set.

    Args:
        workers: processes that draw; all processors by default.

    Raises:
        EasyRefError: a number out of range, or a folder that is not empty or cannot be written to.
    """
    folder = Path(folder)
    if min(options.groups, options.held_out_groups) < 1:
        raise EasyRefError(
            f"There must be groups in both splits; found {options.groups} to train with and "
            f"{options.held_out_groups} held out."
        )
    if not 32 <= options.side <= _LARGEST:
        raise EasyRefError(f"Images are 32 to {_LARGEST} pixels wide, not {options.side}.")
    if not 2 <= options.pictures <= 32:
        raise EasyRefError(
            f"A group has {options.pictures} images; it must be 2 to 32: a target and at least one "
            "reference."
        )
    check_place(folder / "facts.json")
    if folder.exists() and any(folder.iterdir()):
        raise EasyRefError(f"{folder} is not empty. Choose another folder for the data set.")
    jobs = [("training", n) for n in range(options.groups)]
    first = options.first_held_out
    jobs += [("held_out", n) for n in range(first, first + options.held_out_groups)]
    with writing(folder):
        for split in ("training", "held_out"):
            (folder / split).mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
            drawn = [(folder, options, *job) for job in jobs]
            groups = list(pool.map(_draw_job, drawn, chunksize=4))
        _write_lists(folder, groups)
        _write_overview(folder, groups)
    return folder


def draw_group(options: DatasetOptions, part: str, number: int) -> tuple[str, list[Drawn]]:
    """(kind, images) of one group; depends on the seed, part and number only.

    Groups of one kind take identities (or styles) in turn, so none repeats before all have come.
    """
    rng = random.Random(f"{options.seed} {part} {number}")
    place = number % 5
    kind = KINDS[(0, 0, 1, 1, 2)[place]]
    training, held_out = styles() if kind == "style" else identities()
    pool = training if part == "training" else held_out
    turn = number // 5 if kind == "style" else number // 5 * 2 + place % 2
    chosen = pool[turn % len(pool)]
    if isinstance(chosen, Style):
        return kind, style_group(chosen, options.pictures, options.side, rng)
    friends = identities()[0] if kind == "crowded" else ()
    # If the friend were always bigger, its size would reveal it in a single image.
    bigger = part != "training" or turn % 2 == 0
    return kind, identity_group(chosen, options.pictures, options.side, rng, friends, bigger)


def _draw_job(job: tuple[Path, DatasetOptions, str, int]) -> dict[str, Any]:
    """Draw and save one group; returns its entries of the lists."""
    folder, options, split, number = job
    kind, drawn = draw_group(options, split, number)
    names, facts, full = [], {}, {}
    for index, image in enumerate(drawn):
        name = f"{split}/{number:05}_{index}.png"
        image.picture.save(folder / name)
        image.outline.save(folder / name.replace(".png", "_outline.png"))
        names.append(name)
        facts[name] = {**image.facts, "kind": kind}
        full[name] = image.full_caption
    return {
        "split": split,
        "kind": kind,
        "names": names,
        "captions": {n: d.caption for n, d in zip(names, drawn, strict=True)},
        "full": full,
        "facts": facts,
    }


def _write_lists(folder: Path, groups: list[dict[str, Any]]) -> None:
    records: dict[str, list[dict[str, Any]]] = {"training": [], "held_out": []}
    single, captions, facts = [], [], {}
    for group in groups:
        target, *references = group["names"]
        text = group["captions"][target]
        record = {"image_file": references, "text": [text], "target": target}
        records[group["split"]].append(record | {"kind": group["kind"]})
        facts |= group["facts"]
        if group["split"] == "held_out":
            continue
        single.append({"image_file": [target], "text": [text], "target": target})
        for name in group["names"] if group["kind"] != "crowded" else [target]:
            scene, full = group["captions"][name], group["full"][name]
            captions.append({"image_file": [name], "text": [full, full, scene], "target": name})
    lists = {
        "groups": records["training"],
        "held_out": records["held_out"],
        "single": single,
        "captions": captions,
        "facts": facts,
    }
    for name, content in lists.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_overview(folder: Path, groups: list[dict[str, Any]]) -> None:
    """Draw a few groups of each kind, one per row."""
    rows = []
    for kind in KINDS:
        rows += [group["names"] for group in groups if group["kind"] == kind][:_SHOWN]
    pictures = [[Image.open(folder / name) for name in row] for row in rows]
    side = pictures[0][0].width + _GAP
    sheet = Image.new("RGB", (side * len(rows[0]) + _GAP, side * len(rows) + _GAP), (24, 26, 31))
    for y, row in enumerate(pictures):
        for x, picture in enumerate(row):
            sheet.paste(picture, (_GAP + x * side, _GAP + y * side))
    sheet.save(folder / "overview.png")
