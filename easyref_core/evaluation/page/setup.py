"""What was run, as lines of names and values: settings, methods, models and their checksums."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from .record import RunRecord, text_of

_MOST_FACTS, _DEEPEST = 200, 4
_CHECKSUM = re.compile(r"(?:[a-z0-9]+:)?[0-9a-f]{32,128}", re.IGNORECASE)


@dataclass(frozen=True)
class Fact:
    """
    Attributes:
        is_code: a checksum or a name of a file, which may break anywhere.
    """

    name: str
    value: str
    is_code: bool = False


@dataclass(frozen=True)
class Facts:
    """What is known of one method or metric."""

    title: str
    facts: tuple[Fact, ...]


def settings_facts(run: RunRecord) -> Facts:
    return Facts("Settings", facts_of(run.settings))


def method_facts(run: RunRecord) -> list[Facts]:
    return [Facts(text_of(name, 60), facts_of(value)) for name, value in run.methods.items()]


def metric_facts(run: RunRecord) -> list[Facts]:
    found = []
    for number, metric in enumerate(run.metrics, 1):
        title = text_of(metric.get("name") or metric.get("model"), 60) or f"metric {number}"
        found.append(Facts(_without_folders(title), facts_of(metric)))
    return found


def facts_of(value: Any) -> tuple[Fact, ...]:
    """A JSON value as lines, nested names joined; at most `_MOST_FACTS`.

    Values that say nothing, such as "" and [], are left out.
    """
    return tuple(fact for fact, _ in zip(_walk(value, "", 0), range(_MOST_FACTS), strict=False))


def _walk(value: Any, name: str, depth: int) -> Iterator[Fact]:
    if isinstance(value, dict) and value and depth < _DEEPEST:
        for key, inner in value.items():
            words = text_of(key, 60).replace("_", " ")
            yield from _walk(inner, f"{name} {words}".strip(), depth + 1)
        return
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        if depth < _DEEPEST:
            for number, item in enumerate(value, 1):
                yield from _walk(item, f"{name} {number}".strip(), depth + 1)
        return
    text = _plain(value)
    if text:
        is_path = isinstance(value, str) and text != text_of(value)
        yield Fact(name or "value", text, is_path or bool(_CHECKSUM.fullmatch(text)))


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return _without_folders(text_of(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return f"{value:g}" if isinstance(value, float) else text_of(str(value)[:60])
    if isinstance(value, list):
        return text_of(", ".join(_plain(item) for item in value[:50]))
    return ""


def _without_folders(text: str) -> str:
    """An absolute path without the folders that only this computer has: its last two names."""
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(text)
        if path.is_absolute() and len(path.parts) > 3:
            return "…/" + "/".join(path.parts[-2:])
    return text
