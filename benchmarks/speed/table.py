"""The tables, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .timing import Amount, Row


def as_table(found: Mapping[str, Any], rows: Sequence[Row], amounts: Sequence[Amount]) -> str:
    """All that was measured, with its bars."""
    decoder, vision = found["layers"]
    lines = [
        f"{found['machine']}, {found['dtype']}, torch {found['versions']['torch']}, "
        f"{decoder} decoder layers, {vision} vision blocks",
        "",
        "| change after 8 references | share of that | of its multiplications | of its bytes | bar "
        "| met |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        limits = (row.multiplications, row.bytes)
        counted = ("" if limit is None else f"{limit:.3f}" for limit in limits)
        share = f"{row.share:.3f} ± {row.spread:.3f}"
        lines.append(_line(row.measure, share, *counted, *_bar(row)))
    lines += ["", "| measure | found | bar | met |", "| --- | --- | --- | --- |"]
    for one in amounts:
        bar = "" if one.bar is None else f"{one.bar:g} {one.unit}".rstrip()
        verdict = _bar(one)[1]
        lines.append(_line(one.measure, shown(one), bar, verdict))
    decoder, vision = found["layers by references"]
    lines += [
        "",
        f"By references: {decoder} decoder layers, {vision} vision blocks",
        "",
        "| references | tokens | seconds |",
        "| --- | --- | --- |",
    ]
    for count, (tokens, seconds) in found["by references"].items():
        lines.append(_line(count, tokens, f"{seconds:.2f}"))
    return "\n".join(lines) + "\n"


def shown(one: Amount) -> str:
    """Its value with unit, and its spread where it was measured more than once."""
    digits = {"MB": 1}.get(one.unit, 3)
    spread = f" ± {one.spread:.{digits}f}" if one.spread else ""
    return f"{one.value:.{digits}f}{spread} {one.unit}".rstrip()


def _bar(one: Row | Amount) -> tuple[str, str]:
    """(bar, whether it is met)"""
    below = one.below if isinstance(one, Row) else None
    if one.bar is None and below is None:
        return "", ""
    peers = "" if below is None else f", and below {below:.3f}"
    return f"{one.bar:g}{peers}", "yes" if one.met else "NO"


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
