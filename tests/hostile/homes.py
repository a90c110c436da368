"""A home: ComfyUI's base directory with one healthy file of each kind, which cases replace."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from goldens import ADAPTER, GOLDEN, MLLM, expected, user_prompt, write

from easyref_core.tokens.reference_tokens import FORMAT

PROMPT = user_prompt("one_ref_prompt")


@dataclass(frozen=True)
class Home:
    """Paths of the files, under the names that the entry points use."""

    base: Path

    @property
    def adapter(self) -> Path:
        return self.base / "models" / "easyref" / "adapter.safetensors"

    @property
    def mllm(self) -> Path:
        return self.base / "models" / "LLM" / "mllm"

    @property
    def config(self) -> Path:
        return self.mllm / "config.json"

    @property
    def tokens(self) -> Path:
        return self.base / "models" / "easyref_tokens" / "tokens.safetensors"

    @property
    def picture(self) -> Path:
        return self.base / "input" / "picture.png"


def make_home(base: Path) -> Home:
    """Healthy models and a picture; links where the cases do not write."""
    home = Home(base)
    for folder in (home.adapter.parent, home.mllm, home.tokens.parent, home.picture.parent):
        folder.mkdir(parents=True)
    for folder in ("output", "temp"):
        (base / folder).mkdir()
    home.adapter.symlink_to(ADAPTER)
    for file in MLLM.iterdir():
        (home.mllm / file.name).symlink_to(file)
    shutil.copy(GOLDEN / "refs" / "ref_0.png", home.picture)
    write_tokens(home.tokens)
    return home


def write_tokens(path: Path, **changes: Any) -> None:
    """Golden tokens as a file; `changes` replace tensors, or where they are texts, metadata."""
    golden = expected()
    tensors = {"cond": golden["unet.ref_tokens"], "uncond": golden["unet.uncond_ref_tokens"]}
    metadata = {"format": FORMAT, "version": "1", "adapter": golden_identity()}
    for name, change in changes.items():
        if isinstance(change, torch.Tensor):
            tensors[name] = change
        else:
            metadata[name] = change
    write(path, tensors, **metadata)


@cache
def golden_identity() -> str:
    from easyref_core.adapter.checkpoint import load_checkpoint

    return load_checkpoint(ADAPTER).identity


def replaced(path: Path, content: bytes | None = None) -> Path:
    """The path with nothing there, or this content; never writes through a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
    if content is not None:
        path.write_bytes(content)
    return path


def pipe(path: Path) -> None:
    os.mkfifo(replaced(path))


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    """A file of this size that takes no room on the disk."""
    with replaced(path).open("wb") as file:
        file.write(start)
        file.truncate(size)


def change_config(home: Home, **changes: Any) -> None:
    """The golden config.json with other values; `vision_config__depth` goes inside."""
    content = json.loads((MLLM / "config.json").read_text(encoding="utf-8"))
    for name, value in changes.items():
        *sections, key = name.split("__")
        section = content
        for part in sections:
            section = section[part]
        section[key] = value
    replaced(home.config, json.dumps(content).encode())
