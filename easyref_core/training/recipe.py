"""Recipes: YAML files, validated into settings dataclasses by pydantic.

The field types here have the ranges that settings share; every validation error becomes one
sentence for the recipe's reader.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from ..errors import EasyRefError
from ..untrusted import escaped, parse_yaml, read_yaml, shown

STRICT = ConfigDict(extra="forbid")

_Settings = TypeVar("_Settings")


def _number(value: Any) -> Any:
    """YAML reads 1e-4 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def as_tuple(value: Any) -> Any:
    """A list, or a single item, as a tuple."""
    return (
        (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
    )


_MOST = 10**9  # of what can be counted, steps included

Int = Annotated[int, Strict()]
Count = Annotated[Int, Field(gt=0, le=_MOST)]
NonNegativeInt = Annotated[Int, Field(ge=0, le=_MOST)]
Bool = Annotated[bool, Strict()]
Float = Annotated[float, Strict(), BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Float, Field(gt=0)]
Probability = Annotated[Float, Field(ge=0, le=1)]
Decay = Annotated[Float, Field(ge=0, lt=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)]


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe's sections and keys, unchecked.

    Raises:
        EasyRefError: no such file, or not YAML.
    """
    content = read_yaml(path, what="recipe")
    if not isinstance(content, dict):
        raise EasyRefError(
            f"The recipe {escaped(str(path))} holds no settings. See recipes/ for examples."
        )
    return content


def override(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set `section.key=value` texts in a recipe's content.

    Raises:
        EasyRefError: not such a text, or its value is not YAML.
    """
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise EasyRefError(
                f"{shown(text)} is not a setting; write section.key=value, such as "
                "optimiser.steps=100."
            )
        *sections, key = name.strip().split(".")
        target = content
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise EasyRefError(f"{shown(text)}: {shown(section)} is not a section.")
        target[key] = parse_yaml(value, f"The value of {name.strip()}")


def parse_settings(kind: type[_Settings], content: Any) -> _Settings:
    """A settings dataclass from a recipe's plain values.

    Raises:
        EasyRefError: unknown or missing keys, values of a wrong type or out of range.
    """
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        # A misspelt key is missing under its right name, too.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
        raise EasyRefError(_sentence(kind, errors[0])) from None


_LIMITS = {
    "greater_than": "above {gt:,}",
    "greater_than_equal": "{ge:,} or more",
    "less_than": "less than {lt:,}",
    "less_than_equal": "{le:,} or less",
}


def _sentence(kind: type, error: ErrorDetails) -> str:
    """What is wrong with a setting, and what would be right."""
    path = [str(key) for key in error["loc"] if not isinstance(key, int)]
    name, value, context = escaped(".".join(path)), shown(error["input"]), error.get("ctx", {})
    match error["type"]:
        case "unexpected_keyword_argument":
            for section in path[:-1]:
                kind = get_type_hints(kind)[section]
            known = [field.name for field in fields(kind)]
            hint = _nearest(path[-1], known) or f" Known are {', '.join(known)}."
            return f"There is no setting {name}.{hint}"
        case "invalid_key":  # YAML reads some words as other types, such as "on" as true
            return f"There is no setting {value}; names of settings are text."
        case "missing":
            return f"The setting {name} is missing."
        case "dataclass_type":
            return f"{name or 'The recipe'} must be a section of keys, not {value}."
        case "literal_error":
            hint = _nearest(str(error["input"]), re.findall("'(.+?)'", context["expected"]))
            return f"{name} is {value}; it can be {context['expected']}.{hint}"
        case limit if limit in _LIMITS:
            return f"{name} is {value}; it must be {_LIMITS[limit].format(**context)}."
        case "multiple_of":
            return f"{name} is {value}; it must be a multiple of {context['multiple_of']}."
        case "too_short":
            return f"{name} must name at least one."
        case "finite_number":
            return f"{name} is {value}; it must be a finite number."
        case "tuple_type":
            return f"{name} must be a list, not {value}."
        case wrong_type:
            return f"{name} must be of type {wrong_type.partition('_')[0]}, not {value}."


def _nearest(name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {nearest[0]}?" if nearest else ""


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """Settings that differ between two runs, as "name: old -> new"."""
    changed: list[str] = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed += differences(before, after, f"{where}{name}.")
        elif before != after:
            changed.append(escaped(f"{where}{name}: {before!r} -> {after!r}"))
    return changed
