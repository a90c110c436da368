"""Everything that comes from outside passes here: files, JSON, YAML and single values.

A file may be a pipe that never ends, a text may be nested a hundred thousand levels deep, a number
may be NaN. Whatever is wrong is raised as `EasyRefError`, before much time or memory is spent.
"""

from .files import (
    MAX_TEXT_BYTES,
    check_regular,
    inside,
    is_regular,
    open_regular,
    read_bytes,
    read_lines,
)
from .messages import escaped, kind_of, one_line, shown
from .parsing import MAX_DEPTH, parse_json, parse_yaml, read_json, read_yaml
from .values import flag, number, text, whole_number

__all__ = [
    "MAX_DEPTH",
    "MAX_TEXT_BYTES",
    "check_regular",
    "escaped",
    "flag",
    "inside",
    "is_regular",
    "kind_of",
    "number",
    "one_line",
    "open_regular",
    "parse_json",
    "parse_yaml",
    "read_bytes",
    "read_json",
    "read_lines",
    "read_yaml",
    "shown",
    "text",
    "whole_number",
]
