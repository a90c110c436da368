"""Votes on the disk: a line of JSON each, added as they come, never rewritten."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...errors import EasyRefError
from ...files import writing
from ...untrusted import parse_json, read_bytes, text, whole_number

_LARGEST = 256_000_000  # bytes
_LONGEST = 10_000  # characters


@dataclass(frozen=True)
class Vote:
    """What one person said of a pair.

    Attributes:
        pair: its key.
        group, prompt, seed: of both images.
        label_a, label_b: of the pair's first and second image.
        winner: "a", "b" or "tie".
        left: which one stood on the left, "a" or "b".
        image_a, image_b: SHA-256 of the files, as a run can be made anew.
        rater: who voted; may be empty.
        time: in UTC, ISO 8601.
    """

    pair: str
    group: str
    prompt: str
    seed: int
    label_a: str
    label_b: str
    winner: str
    left: str
    image_a: str
    image_b: str
    rater: str = ""
    time: str = ""


@dataclass(frozen=True)
class Votes:
    """The votes of a file.

    Attributes:
        counted: the last of each rater for each pair, those that were taken back left out.
        damaged: lines that are no votes.
    """

    counted: tuple[Vote, ...] = ()
    damaged: int = 0


class VoteFile:
    """A file of votes that one process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Votes:
        """
        Raises:
            EasyRefError: it cannot be read.
        """
        if not os.path.lexists(self.path):
            return Votes()
        found: dict[tuple[str, str], Vote] = {}
        damaged = 0
        for line in read_bytes(self.path, _LARGEST, "file of votes").split(b"\n"):
            if not line.strip():
                continue
            try:
                vote, taken_back = _from_line(line)
            except EasyRefError:
                damaged += 1
                continue
            found.pop((vote.rater, vote.pair), None)  # so that the last one comes last
            if not taken_back:
                found[vote.rater, vote.pair] = vote
        return Votes(tuple(found.values()), damaged)

    def add(self, vote: Vote, taken_back: bool = False) -> None:
        """Add a vote, or take it back; when this returns, it is on the disk.

        Raises:
            EasyRefError: it cannot be written; then nothing of it remains.
        """
        line = json.dumps({**asdict(vote), "taken_back": taken_back}).encode() + b"\n"
        with writing(self.path), self.path.open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # after a power cut
                    line = b"\n" + line
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise


def _from_line(line: bytes) -> tuple[Vote, bool]:
    """(vote, whether it was taken back)

    Raises:
        EasyRefError: it is none.
    """
    looks_right = line.startswith(b"{") and line.endswith(b"}")
    item = parse_json(line, "a vote") if looks_right else None
    if not isinstance(item, dict):
        raise EasyRefError("A vote is an object.")
    vote = Vote(**{field.name: _value(item, field.name) for field in fields(Vote)})
    if vote.winner not in ("a", "b", "tie") or vote.left not in ("a", "b"):
        raise EasyRefError("A vote is for a, b or a tie.")
    return vote, item.get("taken_back") is True


def _value(item: dict[str, Any], name: str) -> Any:
    if name == "seed":
        return whole_number(item.get(name), name, 0)
    value = text(item.get(name), name)
    if len(value) > _LONGEST:
        raise EasyRefError(f"{name} is too long.")
    return value


def matching(votes: Iterable[Vote], images: dict[str, tuple[str, str]]) -> tuple[list[Vote], int]:
    """Votes for images that are there, and how many are for others.

    Args:
        images: key of a pair -> checksums of its two images.
    """
    given = list(votes)
    kept = [vote for vote in given if images.get(vote.pair) == (vote.image_a, vote.image_b)]
    return kept, len(given) - len(kept)
