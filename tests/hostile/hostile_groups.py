"""Tagged pictures to build groups of, and runs to compare, that are damaged, foreign or made to do
harm.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpus import EITHER, USED, Case, Way
from homes import Home, pipe, replaced, sparse
from hostile_pictures import png
from hostile_training import DEEP
from PIL import Image
from rated_run import write_rated_run

BUILD = (Way("groups_entry_points.build", ("--least", "2"), name="easyref build-groups"),)
RATE = (Way("groups_entry_points.rate", name="easyref bench --rate"),)
CONTROL = "\x1b[31m\n"
HUGE = 20_000_000_000  # bytes


def make_groups_home(home: Home) -> None:
    """Tagged pictures in two folders, and a finished run."""
    for number, name in enumerate(("ana", "ana", "bo", "bo")):
        path = home.base / "tagged" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (60 * number, 200 - 60 * number, 80)).save(path)
    write_rated_run(home.base / "run", groups=2, side=16)


def built(name: str, make: Callable[[Path], Any], result: str = USED, said: str = "") -> Case:
    """Changed pictures or texts; `make` gets the folder."""
    return Case(name, lambda home: make(home.base / "tagged"), BUILD, result, said)


def described(name: str, **values: Any) -> Case:
    """A line of metadata for a picture, `file_name` among its values if it is not the picture's."""
    row = {"file_name": "ana/0.png", **values}
    return text(f"metadata of {name}", "metadata.jsonl", json.dumps(row).encode())


def text(name: str, file: str, content: bytes) -> Case:
    return built(name, lambda folder: (folder / file).write_bytes(content))


def commanded(name: str, *more: str, said: str = "") -> Case:
    way = Way("groups_entry_points.build", more, name="easyref build-groups")
    return Case(name, lambda home: None, (way,), said=said)


def rated(name: str, make: Callable[[Path], Any], result: str = EITHER, said: str = "") -> Case:
    """A changed run; `make` gets its folder."""
    return Case(name, lambda home: make(home.base / "run"), RATE, result, said)


def changed_trials(**values: Any) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        trials = json.loads((folder / "trials.json").read_text())
        content = json.dumps([trial | values for trial in trials])
        (folder / "trials.json").write_text(content)

    return make


def many_folders(folder: Path) -> None:
    for _ in range(300):
        folder = folder / "deeper"
    os.makedirs(folder)


def bomb(path: Path) -> None:
    path.write_bytes(png(100_000, 100_000, rows=False))


FILES = {
    "a pipe": pipe,
    "20 GB of zeros": lambda path: sparse(path, HUGE),
    "a folder": lambda path: replaced(path).mkdir(),
    "a link to a device that never ends": lambda path: replaced(path).symlink_to("/dev/zero"),
    "a link to itself": lambda path: replaced(path).symlink_to(path.name),
    "100,000 brackets": lambda path: replaced(path, DEEP),
    "other bytes": lambda path: replaced(path, b"\xff\xfe" * 1000),
}

BUILDING = (
    *(
        built(f"{name} as {file}", lambda folder, make=make, file=file: make(folder / file))
        for name, make in FILES.items()
        for file in ("metadata.jsonl", "ana/0.txt", "ana/9.png")
    ),
    described("a picture outside", file_name="../input/picture.png"),
    described("a picture of the system", file_name="/etc/passwd"),
    described("a picture of a zero byte", file_name="\0"),
    described("a picture of control characters", file_name=CONTROL),
    described("a picture of 1,000,000 letters", file_name="x" * 1_000_000),
    described("a group outside", group="../../out"),
    described("a group of control characters", group=CONTROL),
    described("a group of half a surrogate pair", group="\ud800"),
    described("a kind of control characters", group="ana", kind=CONTROL),
    described("a licence of control characters", licence=CONTROL),
    described("a formula as a licence", licence="=cmd|'/c calc'!A1"),
    described("a text of 10 MB", text="x" * 10_000_000),
    described("100,000 tags", tags=[f"tag {number}" for number in range(100_000)]),
    described("tags of lists", tags=[[["a"]]]),
    described("numbers as texts", text=1e308, tags=7, group=True),
    text("metadata of 100,000 lines that are none", "metadata.jsonl", b"{\n" * 100_000),
    built("a picture that claims 100,000 x 100,000", lambda folder: bomb(folder / "ana" / "9.png")),
    built("300 folders in each other", many_folders),
    built("a link to a folder above", lambda folder: (folder / "up").symlink_to(folder)),
    built(
        "a folder of control characters",
        lambda folder: (folder / "ana").rename(folder / "\x1b[31m"),
    ),
    commanded("a list of tags that is a device", "--tags", "/dev/zero"),
    commanded("a list of tags of 100,000 brackets", "--tags", "BASE/run/trials.json"),
    commanded("least pictures below 0", "--least", "-1", said="--least"),
    commanded("least pictures of 100 digits", "--least", "9" * 100, said="--least"),
    commanded("a share of NaN", "--held-out", "nan", said="--held-out"),
    commanded("a similarity that is infinite", "--like-tag", "inf", said="--like-tag"),
    commanded("a licence of half a surrogate pair", "--least", "2", "--licence", "\udcff"),
    commanded("groups into a device", "--out", "/dev/full"),
    commanded("groups into the system", "--out", "/proc/x"),
    commanded("groups into the pictures", "--out", "BASE/tagged/out", said="read"),
    commanded("groups over the pictures", "--out", "BASE/tagged", said="read"),
    commanded("groups over a run", "--out", "BASE/run", said="not empty"),
    commanded("groups of a zero byte", "--out", "BASE/\0"),
    commanded("a CLIP of control characters", "--clip", CONTROL, "--offline"),
    commanded("a CLIP that is a device", "--clip", "/dev/zero", "--offline"),
    commanded("faces of a folder without any", "--faces", "BASE/run"),
)

RATING = (
    *(
        rated(f"{name} as {file}", lambda folder, make=make, file=file: make(folder / file))
        for name, make in FILES.items()
        for file in (
            *("run.json", "trials.json", "results.json", "votes.jsonl"),
            *("images/0/0/0.png", "images/0/0/0.json", ".votes.lock"),
        )
    ),
    rated("trials outside", changed_trials(path="../../input/picture"), said="outside"),
    rated("trials of the system", changed_trials(path="/etc/passwd")),
    rated("labels of control characters", changed_trials(label=CONTROL), said="only those of"),
    rated("labels of half a surrogate pair", changed_trials(label="\ud800")),
    rated("prompts of half a surrogate pair", changed_trials(prompt="\ud800"), USED),
    rated("groups of 1,000,000 letters", changed_trials(group="x" * 1_000_000)),
    rated("seeds of NaN", changed_trials(seed=float("nan")), said="damaged"),
    rated("references that are numbers", changed_trials(references=[7]), said="damaged"),
    rated("variants that are texts", changed_trials(variant="x"), said="damaged"),
    rated(
        "references that never end",
        changed_trials(references=["/dev/zero"], targets=[], captions=[""], licences=[""]),
        USED,
    ),
    rated(
        "an image that claims 100,000 x 100,000",
        lambda folder: bomb(folder / "images" / "0" / "0" / "0.png"),
        USED,
    ),
    rated("votes of 100,000 lines that are none", lambda folder: votes(folder, b"{\n" * 100_000)),
    rated("votes of numbers", lambda folder: votes(folder, b"1\n1e400\n-0\nNaN\n"), USED),
    rated("votes of 1,000,000 letters", lambda folder: votes(folder, b'"' + b"x" * 1_000_000)),
)


def votes(folder: Path, content: bytes) -> None:
    (folder / "votes.jsonl").write_bytes(content)


CASES = (*BUILDING, *RATING)
