"""Files of saved reference tokens that are damaged, foreign or made to do harm."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from typing import Any

import torch
from corpus import EITHER, Case, Way
from homes import Home, pipe, replaced, sparse, write_tokens
from hostile_adapters import Program, deflated

from easyref_core.tokens.reference_tokens import FORMAT

WAYS = (
    Way("python_tokens", name="Python"),
    Way("comfy_entry_points.graph", more={"name": "saved"}, name="nodes"),
)
LISTED = (*WAYS, Way("comfy_entry_points.choices", name="choices"))
SHAPE = (1, 16, 96)


def tokens(**changes: Any) -> Callable[[Home], None]:
    return lambda home: write_tokens(replaced(home.tokens), **changes)


def sparse_tokens(*shape: int) -> Callable[[Home], None]:
    """Tokens of this shape, all zeros, that take no room on the disk."""

    def make(home: Home) -> None:
        size = math.prod(shape) * 4
        header: dict[str, Any] = {
            name: {"dtype": "F32", "shape": shape, "data_offsets": [start, start + size]}
            for name, start in (("cond", 0), ("uncond", size))
        }
        header["__metadata__"] = {"format": FORMAT, "version": "1"}
        content = json.dumps(header).encode()
        content += b" " * (-len(content) % 8)
        start = struct.pack("<Q", len(content)) + content
        sparse(home.tokens, len(start) + 2 * size, start)

    return make


def program(home: Home) -> None:
    torch.save({"cond": Program(home.base / "marker")}, replaced(home.tokens))


def folder_in_a_circle(home: Home) -> None:
    (home.tokens.parent / "circle").symlink_to(home.tokens.parent)
    (home.base / "output" / "easyref_tokens").mkdir()
    (home.base / "output" / "easyref_tokens" / "circle").symlink_to("..")


def saved_pipe(home: Home) -> None:
    folder = home.base / "output" / "easyref_tokens"
    folder.mkdir()
    os.mkfifo(folder / "pipe.safetensors")


CASES = (
    *(
        Case(f"tokens of {dtype}", tokens(cond=torch.ones(SHAPE).to(dtype)), WAYS)
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64)
    ),
    *(
        Case(f"tokens that hold {value}", tokens(cond=torch.full(SHAPE, value)), WAYS)
        for value in (math.nan, math.inf, -math.inf)
    ),
    *(
        Case(f"tokens of shape {list(shape)}", tokens(cond=torch.ones(shape)), WAYS)
        for shape in ((), (96,), (16, 96), (1, 0, 96), (0, 16, 96), (1, 16, 0), (1, 1, 16, 96))
    ),
    Case(
        "no tokens at all",
        tokens(cond=torch.ones(1, 0, 96), uncond=torch.ones(1, 0, 96)),
        WAYS,
    ),
    Case("20 GB of tokens", sparse_tokens(1, 26_041_666, 96), WAYS, mapped=45_000),
    Case("a batch of 20 GB of tokens", sparse_tokens(1_627_604, 16, 96), WAYS, mapped=45_000),
    Case("tokens as wide as 2 to the 31", sparse_tokens(1, 1, 2**31), WAYS, mapped=40_000),
    *(
        Case(f"{name} {value[:20]!r}", tokens(**{name: value}), WAYS, result)
        for name, values, result in (
            ("version", ("-1", "0", "9" * 5000, "1.5", "one", "", "²"), "refused"),
            ("num_references", ("-1", "9" * 5000, "1e9", "many"), "refused"),
            ("format", ("", "another", "\x1b[31m"), "refused"),
            ("aggregation", ("", "\x1b[31mred", "x" * 100_000), EITHER),
            ("adapter", ("", "\x1b[31mred\n\r", "x" * 1_000_000, "../../etc"), EITHER),
            ("adapter_name", ("\x1b]0;title\x07", "x" * 1_000_000), EITHER),
            ("prompt", ("\0\x1b[2J", "x" * 3_000_000), EITHER),
        )
        for value in values
    ),
    Case("tokens in a pickle that starts a program", program, WAYS),
    Case("tokens in a deflated pickle of 400 MB", lambda home: deflated(home.tokens), WAYS),
    Case("a pipe", lambda home: pipe(home.tokens), WAYS),
    Case("a pipe among them", lambda home: pipe(home.tokens), LISTED[-1:], "used"),
    Case("a pipe among those saved", saved_pipe, LISTED[-1:], "used"),
    Case("folders in a circle", folder_in_a_circle, LISTED, "used"),
    Case("a link to a device", lambda home: replaced(home.tokens).symlink_to("/dev/zero"), WAYS),
    Case("a link to itself", lambda home: replaced(home.tokens).symlink_to(home.tokens), WAYS),
)
