"""JSON and YAML, of bounded size and depth."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import EasyRefError
from .files import MAX_TEXT_BYTES, read_bytes
from .messages import escaped, one_line

MAX_DEPTH = 200
MAX_YAML_BYTES = 65_536  # PyYAML takes seconds for more; a recipe has 3,000
_MAX_YAML_VALUES = 100_000
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b'[]{}"')


def read_json(path: str | Path, limit: int = MAX_TEXT_BYTES, what: str = "file") -> Any:
    """The content of a JSON file.

    Raises:
        EasyRefError: see `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, limit, what), str(path))


def parse_json(text: str | bytes, source: str) -> Any:
    """The value that a JSON text stands for. Its types and ranges remain to be checked.

    Args:
        source: where it comes from, for messages.

    Raises:
        EasyRefError: it is not JSON, or nested too deep.
    """
    source = escaped(source)
    try:
        content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        # Before parsing: what follows from a recursion error depends on the process's stack.
        if _depth(content) > MAX_DEPTH:
            raise EasyRefError(
                f"{source} is nested more than {MAX_DEPTH} levels deep, which is no sensible JSON. "
                "Get the file again."
            )
        return json.loads(content.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except EasyRefError:
        raise
    except (ValueError, RecursionError) as error:
        raise EasyRefError(
            f"{source} cannot be read as JSON ({escaped(str(error))}). Correct it, or get it again."
        ) from error


def _depth(content: bytes) -> int:
    """The nesting of a JSON text, as far as it matters; brackets in texts do not count."""
    plain = re.sub(rb"\\.", b"", content, flags=re.DOTALL).translate(None, _NOT_STRUCTURE)
    depth = deepest = 0
    for byte in re.sub(rb'"[^"]*"', b"", plain):
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
            if depth > MAX_DEPTH:
                break
        elif byte in b"]}":
            depth -= 1
    return deepest


def read_yaml(path: str | Path, what: str = "file") -> Any:
    """The content of a YAML file of plain values.

    Raises:
        EasyRefError: see `read_bytes` and `parse_yaml`.
    """
    return parse_yaml(read_bytes(path, MAX_YAML_BYTES, what), str(path))


def parse_yaml(text: str | bytes, source: str) -> Any:
    """The plain values that a YAML text stands for.

    Raises:
        EasyRefError: it is not YAML, nested too deep, or repeats itself by references until
            nothing could hold it.
    """
    import yaml

    source = escaped(source)
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        if len(text) > MAX_YAML_BYTES:
            raise ValueError(f"it is longer than {MAX_YAML_BYTES:,} characters")
        if _depth(text.encode("utf-8", "surrogatepass")) > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        content = yaml.safe_load(text)
        _count_values(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise EasyRefError(
            f"{source} is not YAML that can be used: {one_line(error)}. Correct it."
        ) from error
    return content


def _count_values(content: Any) -> None:
    """Raise ValueError for a tree of too many values; what is referred to twice counts twice."""
    waiting, count = [content], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count + len(waiting) > _MAX_YAML_VALUES:
            raise ValueError(f"it holds more than {_MAX_YAML_VALUES:,} values")
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
