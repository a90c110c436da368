"""Names and values from outside as they may stand in a message: one line, no control characters."""

from __future__ import annotations

import numbers
from pathlib import Path
from typing import Any

_LINE = 60


def shown(value: Any, longest: int = _LINE) -> str:
    """A value from outside as it may stand in a message: one line without control characters.

    Args:
        value: text is quoted; other values are written as in JSON where possible.
        longest: characters, the rest is left out.
    """
    if value is None:
        return "nothing"
    if isinstance(value, (str, Path)):
        # Longer texts are cut first: escaping a gigabyte for sixty characters takes seconds.
        text = f"'{escaped(str(value)[: longest + 1])}'"
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, numbers.Number):
        try:
            text = str(value)
        except ValueError:  # Python writes no integer of more than 4,300 digits
            text = "a very large number"
    elif isinstance(value, (list, tuple, dict)):
        text = kind_of(value)
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= longest else text[: longest - 3] + "..."


def escaped(text: str) -> str:
    """A text with what a terminal or a log would act on written out, such as `\\x1b`."""
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape", "backslashreplace").decode("ascii")
        for character in text
    )


def kind_of(value: Any) -> str:
    """What a JSON value is, for messages."""
    if value is None:
        return "nothing"
    names = {dict: "an object", list: "a list", tuple: "a list", str: "a text"}
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, numbers.Number):
        return "a number"
    return names.get(type(value), f"a {type(value).__name__}")


def one_line(error: BaseException) -> str:
    """Another library's error as it may stand in a message."""
    text = escaped(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
