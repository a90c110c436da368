"""Recipes, records and base models of training that are damaged, foreign or made to do harm."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from corpus import EITHER, USED, Case, Way
from goldens import GOLDEN, MLLM
from homes import Home, pipe, replaced, sparse

DRY = (Way("command_train", ("--dry-run",), name="easyref train --dry-run"),)
CONFIG = "text_encoder/config.json"


def make_training_home(home: Home, sdxl: Path) -> None:
    """A base model, records and a recipe that trains on them."""
    shutil.copytree(sdxl, home.base / "sdxl", copy_function=os.symlink)
    records = home.base / "records"
    records.mkdir()
    names = [f"ref_{number}.png" for number in range(4)]
    for name in names:
        shutil.copy(GOLDEN / "refs" / name, records / name)
    record = {"image_file": names[1:], "text": ["a ball"], "target": names[0]}
    (records / "records.json").write_text(json.dumps([record] * 4))
    (home.base / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(home)))


def recipe_of(home: Home) -> dict[str, Any]:
    records = home.base / "records"
    return {
        "stage": "alignment",
        "model": {
            "base": str(home.base / "sdxl"),
            "mllm": str(MLLM),
            "reference_tokens": 4,
            "lora_rank": 2,
        },
        "data": {
            "files": [str(records / "records.json")],
            "root": str(records),
            "resolution": 64,
            "crop": "center",
            "image_size": 56,
            "workers": 0,
        },
        "optimiser": {
            "parts": ["projector", "lora"],
            "steps": 1,
            "learning_rate": 1e-3,
            "batch_size": 1,
            "precision": "no",
        },
        "output": {"folder": str(home.base / "run"), "trackers": []},
    }


def text(content: bytes) -> Callable[[Home], None]:
    """A recipe of this text."""
    return lambda home: replaced(
        home.base / "recipe.yaml", content.replace(b"BASE", os.fsencode(home.base))
    )


def setting(section: str, key: str, value: Any) -> Callable[[Home], None]:
    def make(home: Home) -> None:
        recipe = recipe_of(home)
        recipe[section][key] = value
        (home.base / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    return make


def records(content: bytes) -> Callable[[Home], None]:
    return lambda home: replaced(home.base / "records" / "records.json", content)


def record(**changes: Any) -> Callable[[Home], None]:
    """All records are of this kind."""

    def make(home: Home) -> None:
        given = {"image_file": ["ref_1.png"], "text": "a ball", "target": "ref_0.png"} | changes
        records(json.dumps([given]).replace("BASE", str(home.base)).encode())(home)

    return make


def shard(fill: Callable[[tarfile.TarFile, Home], Any], mode: str = "w") -> Callable[[Home], None]:
    """A tar shard instead of the JSON list."""

    def make(home: Home) -> None:
        with tarfile.open(replaced(home.base / "records" / "records.json"), mode) as tar:
            fill(tar, home)

    return make


def member(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


def linked_members(tar: tarfile.TarFile, home: Home) -> None:
    member(tar, "a.json", b'{"text": "x"}')
    for name, target in (("a.target.png", "/etc/passwd"), ("a.0.png", "../../secret")):
        member(tar, name, type=tarfile.SYMTYPE, linkname=target)


def huge_member(home: Home) -> None:
    """A shard whose picture claims 20 GB, of a file that takes no room."""
    path = replaced(home.base / "records" / "records.json")
    info = tarfile.TarInfo("a.target.png")
    info.size = 20_000_000_000
    start = info.tobuf(tarfile.GNU_FORMAT)
    sparse(path, len(start) + info.size + 1024, start)


def many_members(tar: tarfile.TarFile, home: Home) -> None:
    for number in range(30_000):
        tar.addfile(tarfile.TarInfo(f"{number}.txt"))


def base_file(name: str, content: bytes | None) -> Callable[[Home], None]:
    return lambda home: replaced(home.base / "sdxl" / name, content)


def base_pipe(name: str) -> Callable[[Home], None]:
    return lambda home: pipe(home.base / "sdxl" / name)


def code_in_base(home: Home) -> None:
    """A pipeline of its own beside the parts, which their configurations name."""
    folder = home.base / "sdxl" / "unet"
    (folder / "own.py").write_text(f"import os\nos.system(\"touch '{home.base / 'marker'}'\")\n")
    config = folder / "config.json"
    given = json.loads(config.read_text())
    given |= {"_class_name": ["own", "Own"], "auto_map": {"AutoModel": "own.Own"}}
    replaced(config, json.dumps(given).encode())


def other_sizes(home: Home) -> None:
    """The weights of one text encoder for the configuration of the other."""
    sdxl = home.base / "sdxl"
    target = sdxl / "text_encoder" / "model.safetensors"
    content = (sdxl / "text_encoder_2" / "model.safetensors").read_bytes()
    replaced(target, content)


DEEP = b"[" * 100_000 + b"]" * 100_000
BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n".encode()
    for n in range(9)
)

CASES = (
    Case("healthy", lambda home: None, DRY, USED),
    # Recipes
    Case("a recipe of 100,000 brackets", text(DEEP), DRY),
    Case("a recipe that refers to itself until nothing holds it", text(BOMB), DRY),
    Case("a recipe within itself", text(b"&a [*a]"), DRY),
    Case(
        "a recipe that starts a program",
        text(b"stage: !!python/object/apply:os.system [\"touch 'BASE/marker'\"]"),
        DRY,
    ),
    Case("a recipe of control characters", text(b"\x1b[31m: \x07"), DRY),
    Case("a recipe of a key of control characters", text(b'"\\e[31m\\n": 1'), DRY),
    Case("a recipe of other bytes", text(b"\xff\xfe\0\0"), DRY),
    Case(
        "a recipe of 20 GB",
        lambda home: sparse(home.base / "recipe.yaml", 20_000_000_000, b"a: 1\n"),
        DRY,
    ),
    Case("a recipe that is a pipe", lambda home: pipe(home.base / "recipe.yaml"), DRY),
    Case(
        "a recipe that is a folder", lambda home: replaced(home.base / "recipe.yaml").mkdir(), DRY
    ),
    *(
        Case(f"{section}.{key} of {value!r}", setting(section, key, value), DRY)
        for section, key, values in (
            ("optimiser", "batch_size", (10**9, 10**18, -1, 0.5, True)),
            ("optimiser", "learning_rate", (float("nan"), float("inf"), 1e30)),
            ("optimiser", "weight_decay", (float("nan"), float("inf"))),
            ("optimiser", "accumulation", (10**18,)),
            ("optimiser", "noise_levels", (10**9,)),
            ("model", "reference_tokens", (10**9, 10**18)),
            ("model", "lora_rank", (10**9,)),
            ("model", "final_layers", (10**9, 5)),
            ("data", "resolution", (10**9, 1)),
            ("data", "image_size", (10**9,)),
            ("data", "workers", (10**6,)),
            ("data", "drop_text", (float("nan"),)),
            ("model", "base", ("/dev/zero", "\x1b[31m\n", "x" * 5000, "\0")),
            ("model", "mllm", ("/etc", "\x1b[31m\n", "hub/model")),
            ("output", "folder", ("/proc/1/x", "/dev/null", "\0", "x" * 5000)),
        )
        for value in values
    ),
    # Records
    Case("records of 100,000 brackets", records(DEEP), DRY),
    Case("records that are no list", records(b"{}"), DRY),
    Case("records that are nothing", records(b""), DRY),
    Case("records of other bytes", records(b"\xff\xfe"), DRY),
    Case("records of numbers", records(b"[1, null, true, [], {}, 1e400]"), DRY),
    Case("records that are a pipe", lambda home: pipe(home.base / "records" / "records.json"), DRY),
    Case(
        "records of 20 GB of zeros",
        lambda home: sparse(home.base / "records" / "records.json", 20_000_000_000),
        DRY,
    ),
    *(
        Case(f"a record of {name}", record(**changes), DRY)
        for name, changes in (
            ("target 7", {"target": 7}),
            ("a target of a zero byte", {"target": "\0"}),
            ("a target of control characters", {"target": "\x1b[31m\n.png"}),
            ("a target that is a device", {"target": "/dev/zero"}),
            ("a text of half a surrogate pair", {"text": "\ud800"}),
            ("a text of numbers", {"text": [1, 2]}),
            ("pictures of numbers", {"image_file": [1]}),
            ("no pictures", {"image_file": []}),
            ("a face of NaN", {"image_file": None, "face": [[float("nan")] * 5]}),
            ("a face of texts", {"image_file": None, "face": [["a"] * 5]}),
            ("a face of 10**400", {"image_file": None, "face": [[10**400] * 5]}),
            ("a face outside the picture", {"image_file": None, "face": [[1e9, 1e9, 2e9, 2e9, 1]]}),
        )
    ),
    Case(
        "a picture that is a pipe among the records",
        lambda home: pipe(home.base / "records" / "ref_1.png"),
        DRY,
        EITHER,
    ),
    Case("a shard of links", shard(linked_members), DRY),
    Case("a shard of one picture of 20 GB", huge_member, DRY),
    Case("a shard of 30,000 other files", shard(many_members), DRY),
    Case(
        "a shard of JSON of 100,000 brackets",
        shard(lambda tar, home: (member(tar, "a.json", DEEP), member(tar, "a.target.png", b"x"))),
        DRY,
    ),
    Case("a compressed shard", shard(many_members, "w:gz"), DRY),
    Case(
        "a shard cut off",
        lambda home: (
            shard(many_members)(home),
            replaced(
                home.base / "records" / "records.json",
                (home.base / "records" / "records.json").read_bytes()[:1300],
            ),
        ),
        DRY,
    ),
    # The base model
    *(
        Case(f"a base without {name}", base_file(name, None), DRY, said="base")
        for name in (
            "unet/config.json",
            "vae/config.json",
            CONFIG,
            "text_encoder_2/config.json",
            "tokenizer/vocab.json",
            "scheduler/scheduler_config.json",
        )
    ),
    *(
        Case(f"a base with {name} of {kind}", base_file(name, given), DRY, said="base")
        for name in (
            "unet/config.json",
            "vae/config.json",
            CONFIG,
            "scheduler/scheduler_config.json",
        )
        for kind, given in (
            ("100,000 brackets", b'{"a":' + DEEP + b"}"),
            ("no JSON", b"{"),
            ("a list", b"[]"),
            ("nothing", b""),
            ("other bytes", b"\xff\xfe"),
        )
    ),
    *(
        Case(f"a base with a pipe as {name}", base_pipe(name), DRY, said="base")
        for name in ("unet/config.json", CONFIG, "tokenizer/vocab.json")
    ),
    Case("a base whose weights have other sizes", other_sizes, DRY, said="base"),
    Case("a base with code of its own", code_in_base, DRY, EITHER),
)
