"""Groups, data sets and runs of the benchmark that are damaged, foreign or made to do harm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_fakes import bench, make_groups, settings_for
from corpus import EITHER, USED, Case, Way
from homes import Home, pipe, replaced, sparse

RUN = (Way("bench_entry_points.run", name="easyref bench"),)
READ = (*RUN, Way("bench_entry_points.read", name="its page"))
DEEP = b"[" * 100_000 + b"]" * 100_000
CONTROL = "\x1b[31m\n"


def by(protocol: str) -> tuple[Way, ...]:
    return (
        Way("bench_entry_points.run", (protocol,), name=f"easyref bench --protocol {protocol}"),
    )


def make_bench_home(home: Home) -> None:
    """Two groups."""
    make_groups(home.base / "groups", {"a": 3, "b": 2})


def put(name: str, content: bytes | None) -> Callable[[Home], None]:
    """A file of the groups."""

    def make(home: Home) -> None:
        path = home.base / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        replaced(path, content)

    return make


def only(name: str, content: bytes) -> Callable[[Home], None]:
    """Nothing but this file among the groups, and a picture that it may name."""

    def make(home: Home) -> None:
        picture = (home.base / "groups" / "a" / "0.png").read_bytes()
        shutil.rmtree(home.base / "groups")
        put("val2017/1.png", picture)(home)
        put("dog/1.png", picture)(home)
        put("task/1_0.png", picture)(home)
        put(name, content)(home)

    return make


def finished(change: Callable[[Path], Any]) -> Callable[[Home], None]:
    """A run that is finished, changed."""

    def make(home: Home) -> None:
        bench(settings_for(home.base, images=1, methods=["none"]))
        change(home.base / "run")

    return make


def in_run(name: str, content: bytes) -> Callable[[Home], None]:
    return finished(lambda run: replaced(run / name, content))


def in_run_json(name: str, **changes: Any) -> Callable[[Home], None]:
    """Other values in a JSON file of the run; of a list, in its first item."""

    def change(run: Path) -> None:
        content = json.loads((run / name).read_text())
        (content[0] if isinstance(content, list) else content).update(changes)
        (run / name).write_text(json.dumps(content))

    return finished(change)


def scores(content: bytes) -> Callable[[Home], None]:
    return finished(
        lambda run: [
            path.write_bytes(content) for path in (run / "work" / "scores").rglob("*.json")
        ]
    )


def odd_names(home: Home) -> None:
    folder = home.base / "groups"
    (folder / "a").rename(folder / CONTROL)
    (folder / CONTROL / "0.png").rename(folder / CONTROL / f"{CONTROL}.png")
    (folder / "circle").symlink_to("circle")
    (folder / "root").symlink_to("/")


def many_files(home: Home) -> None:
    for number in range(2_000):
        (home.base / "groups" / "a" / f"{number}.dat").touch()


CASES = (
    Case("healthy groups", lambda home: None, RUN, USED),
    Case("a healthy run", finished(lambda run: None), READ, USED),
    # Groups
    Case("names of control characters and links to everywhere", odd_names, RUN, USED),
    Case("a group of 2,000 other files", many_files, RUN, USED),
    Case("a pipe as a picture", lambda h: pipe(h.base / "groups" / "a" / "p.png"), RUN, USED),
    Case("a pipe as a caption", lambda h: pipe(h.base / "groups" / "a" / "0.txt"), RUN, USED),
    Case("a pipe as metadata", lambda h: pipe(h.base / "groups" / "metadata.jsonl"), RUN, USED),
    Case("a pipe as training data", lambda h: pipe(h.base / "groups" / "held_in.json"), RUN, USED),
    Case(
        "a caption of 20 GB",
        lambda home: sparse(home.base / "groups" / "a" / "0.txt", 20_000_000_000, b"a"),
        RUN,
        USED,
    ),
    Case(
        "metadata of 20 GB",
        lambda home: sparse(home.base / "groups" / "metadata.jsonl", 20_000_000_000, b"{}\n"),
        RUN,
        USED,
    ),
    *(
        Case(f"{name} of {kind}", put(name, content), RUN, result)
        for name, result in (
            ("a/0.txt", USED),
            ("a/metadata.jsonl", USED),
            ("a/0.png", USED),
            ("held_in.json", EITHER),
        )
        for kind, content in (
            ("100,000 brackets", DEEP),
            ("other bytes", b"\xff\xfe\0\0"),
            ("control characters", CONTROL.encode() * 100),
            ("nothing", b""),
        )
    ),
    *(
        Case(
            f"a line of metadata with {what}",
            put("a/metadata.jsonl", json.dumps(line).encode()),
            RUN,
            USED,
        )
        for what, line in (
            ("a name that leads out", {"file_name": "../../../etc/passwd", "text": "a"}),
            ("a name of 100,000 letters", {"file_name": "a" * 100_000}),
            ("a name of control characters", {"file_name": CONTROL, "text": CONTROL}),
            ("half a surrogate pair", {"file_name": "0.png", "text": "\ud800"}),
            ("a number as text", {"file_name": "0.png", "text": 10**400}),
            ("a list as kind", {"file_name": "0.png", "kind": [1]}),
            ("a text of 1 MB", {"file_name": "0.png", "text": "a" * 1_000_000}),
        )
    ),
    *(
        Case(
            f"training data with {what}",
            put("held_in.json", json.dumps([record]).encode()),
            RUN,
            EITHER,
        )
        for what, record in (
            (
                "pictures that lead out",
                {"image_file": ["../../x.png"] * 3, "target": "/etc/passwd"},
            ),
            ("a pipe's name", {"image_file": ["/dev/zero"], "text": "a", "target": "/dev/zero"}),
            ("texts of numbers", {"image_file": ["a/0.png"], "text": [1], "target": "a/1.png"}),
            ("a number in place of a record", 5),
        )
    ),
    Case("no groups", lambda home: shutil.rmtree(home.base / "groups"), RUN, said="neither"),
    Case("a pipe as groups", lambda home: pipe(home.base / "groups"), RUN),
    # Published data sets
    *(
        Case(f"{name} of {kind}", only(name, content), by(protocol))
        for protocol, name in (
            ("coco", "annotations/captions_val2017.json"),
            ("dreambooth", "prompts_and_classes.txt"),
            ("multibanana", "task/1_prompt.txt"),
        )
        for kind, content in (("other bytes", b"\xff\xfe\0\0"),)
    ),
    Case("annotations of 100,000 brackets", only("captions_val2017.json", DEEP), by("coco")),
    *(
        Case(
            f"annotations with {what}",
            only("captions_val2017.json", json.dumps(content).encode()),
            by("coco"),
            EITHER,
        )
        for what, content in (
            ("lists in place of ids", {"images": [{"id": [], "file_name": "1.png"}]}),
            ("a name that leads out", {"images": [{"id": 1, "file_name": "../../x.png"}]}),
            ("a number as caption", {"images": [], "annotations": [{"image_id": 1, "caption": 5}]}),
            ("no list", {"images": {"a": 1}, "annotations": 5, "licenses": "a"}),
        )
    ),
    Case(
        "prompts of a million quotes",
        only("prompts_and_classes.txt", b"Classes\ndog,dog\nPrompts\n'" + b"'" * 1_000_000),
        by("dreambooth"),
    ),
    # Runs
    *(
        Case(f"{name} of {kind}", in_run(name, content), ways, result)
        for name, ways, result in (
            ("run.json", RUN, "refused"),
            ("trials.json", RUN, USED),
            ("images/none/a/0.json", RUN, USED),
            ("images/none/a/0.png", RUN, USED),
            ("work/pictures.json", RUN, USED),
            ("results.json", RUN, USED),
        )
        for kind, content in (
            ("100,000 brackets", DEEP),
            ("other bytes", b"\xff\xfe\0\0"),
            ("a list", b"[1]"),
            ("a number", b"5"),
        )
    ),
    *(
        Case(f"a pipe as {name}", finished(lambda run, name=name: pipe(run / name)), RUN, result)
        for name, result in (
            ("run.json", "refused"),
            ("trials.json", EITHER),
            ("images/none/a/0.json", USED),
            ("images/none/a/0.png", USED),
            ("work/pictures.json", USED),
            ("results.json", USED),
            (".lock", EITHER),
        )
    ),
    *(
        Case(f"run.json with {name} of {value!r}", in_run_json("run.json", **{name: value}), RUN)
        for name, value in (
            ("settings", [1]),
            ("settings", {"weight": {}}),
            ("methods", None),
            ("methods", {"none": 5}),
            ("version", CONTROL),
            ("version", 10**30),
        )
    ),
    *(
        Case(
            f"a trial with {name} of {what}", in_run_json("trials.json", **{name: value}), READ[1:]
        )
        for name, what, value in (
            ("path", "another folder", "../../x"),
            ("path", "control characters", CONTROL + "/../../../x"),
            ("variant", "nothing", None),
            ("variant", "numbers", {"method": 1}),
            ("references", "numbers", [1]),
            ("seed", "10**400", 10**400),
            ("captions", "a text", "abc"),
        )
    ),
    *(
        Case(f"scores of {kind}", scores(content), RUN, USED)
        for kind, content in (
            ("100,000 brackets", DEEP),
            ("a list", b"[]"),
            ("texts", b'{"images": {}, "errors": 1, "scores": {"a": {"b": "c"}}}'),
        )
    ),
)
