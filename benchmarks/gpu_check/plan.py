"""Which checks there are, and how ComfyUI is started for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GIB = 1024**3
SMALL_CARD = 6 * GIB
"""Bytes of the card that a big one stands in for."""

USUAL, STATIC, SMALL_USUAL, SMALL_STATIC = "usual", "static", "6 GB", "6 GB static"


@dataclass(frozen=True)
class Check:
    """One function that yields rows.

    Attributes:
        name: for `--only`; a check of two parts has two functions.
        function: "module:function" in this package.
        start: how ComfyUI is started.
        seconds: after which it has failed, its models' first building included.
        gpu_only: what it measures on a CPU says nothing, so it cannot pass there.
    """

    name: str
    function: str
    start: str = USUAL
    seconds: int = 120
    gpu_only: bool = True


CHECKS = (
    # First, in a process that has loaded nothing yet.
    Check("free", "memory:free", seconds=180),
    Check("parity", "parity:parity", gpu_only=False),
    Check("syncs", "sampling:syncs"),
    Check("step", "sampling:step"),
    Check("first_step", "sampling:first_step"),
    Check("encode", "encoding:encode"),
    Check("growth", "memory:growth"),
    Check("quantised", "quantised:quantised", seconds=180, gpu_only=False),
    Check("dynamic", "dynamic:with_dynamic_vram"),
    # Last: what is compiled stays in the process.
    Check("compile", "compiled:compiled", seconds=180, gpu_only=False),
    Check("dynamic", "dynamic:without_dynamic_vram", STATIC),
    Check("small_card", "memory:small_card", SMALL_USUAL, seconds=180),
    Check("small_card", "memory:small_card", SMALL_STATIC, seconds=180),
)
NAMES = tuple(dict.fromkeys(check.name for check in CHECKS))


def chosen(only: Sequence[str]) -> list[Check]:
    """The checks of these names, all where none is named."""
    return [check for check in CHECKS if not only or check.name in only]


def starts(checks: Sequence[Check]) -> dict[str, list[Check]]:
    """Way of starting -> its checks, in order."""
    found: dict[str, list[Check]] = {}
    for check in checks:
        found.setdefault(check.start, []).append(check)
    return found


def flags(start: str, card_bytes: int, known: str) -> Sequence[str] | str:
    """ComfyUI's options for a way of starting, or why there is no such way here.

    Args:
        card_bytes: memory of the card.
        known: text of the core's own list of options.
    """
    found: list[str] = []
    if start in (STATIC, SMALL_STATIC):
        if "--disable-dynamic-vram" not in known:
            return "this ComfyUI has no dynamic VRAM: the other run of this check says it all"
        found.append("--disable-dynamic-vram")
    if start in (SMALL_USUAL, SMALL_STATIC):
        if card_bytes <= SMALL_CARD:
            return found  # a card of that size needs no pretence
        # The host counts what is free on the card, of which the allocator gets a part only.
        found += ["--reserve-vram", f"{(card_bytes - SMALL_CARD) / GIB:.2f}"]
    return found


def by_name(functions: Sequence[str]) -> Mapping[str, Check]:
    """Function -> a check that it belongs to."""
    return {check.function: check for check in CHECKS if check.function in functions}
