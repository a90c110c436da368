"""The list of checks, and ComfyUI's options for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GIB = 1024**3
SMALL_CARD = 6 * GIB
"""Memory of the simulated small card, in bytes."""

USUAL, STATIC, SMALL_USUAL, SMALL_STATIC = "usual", "static", "6 GB", "6 GB static"


@dataclass(frozen=True)
class Check:
    """A function that yields rows.

    Attributes:
        name: for `--only`; a check of two parts has two functions.
        function: "module:function" in this package.
        start: name of a set of ComfyUI options, see `flags`.
        seconds: time limit, building the models included.
        gpu_only: on a CPU its measurements are meaningless and get no verdict.
    """

    name: str
    function: str
    start: str = USUAL
    seconds: int = 120
    gpu_only: bool = True


CHECKS = (
    # First: it needs a process that has loaded nothing yet.
    Check("free", "memory:free", seconds=180),
    Check("parity", "parity:parity", gpu_only=False),
    Check("syncs", "sampling:syncs"),
    Check("step", "sampling:step"),
    Check("first_step", "sampling:first_step"),
    Check("encode", "encoding:encode"),
    Check("growth", "memory:growth"),
    Check("quantised", "quantised:quantised", seconds=180, gpu_only=False),
    Check("dynamic", "dynamic:with_dynamic_vram"),
    # Last: compiled code stays in the process.
    Check("compile", "compiled:compiled", seconds=180, gpu_only=False),
    Check("dynamic", "dynamic:without_dynamic_vram", STATIC),
    Check("small_card", "memory:small_card", SMALL_USUAL, seconds=180),
    Check("small_card", "memory:small_card", SMALL_STATIC, seconds=180),
)
NAMES = tuple(dict.fromkeys(check.name for check in CHECKS))


def chosen(only: Sequence[str]) -> list[Check]:
    """The checks of these names; all if none is given."""
    return [check for check in CHECKS if not only or check.name in only]


def starts(checks: Sequence[Check]) -> dict[str, list[Check]]:
    """Name of a set of options -> its checks, in order."""
    by_start: dict[str, list[Check]] = {}
    for check in checks:
        by_start.setdefault(check.start, []).append(check)
    return by_start


def flags(start: str, card_bytes: int, known: str) -> Sequence[str] | str:
    """ComfyUI's options by their name, or the reason why they do not apply here.

    Args:
        card_bytes: memory of the card.
        known: source text of the core's option parser.
    """
    options: list[str] = []
    if start in (STATIC, SMALL_STATIC):
        if "--disable-dynamic-vram" not in known:
            return "this ComfyUI has no dynamic VRAM: the other run of this check says it all"
        options.append("--disable-dynamic-vram")
    if start in (SMALL_USUAL, SMALL_STATIC):
        if card_bytes <= SMALL_CARD:
            return options  # nothing to simulate
        # ComfyUI counts the free memory of the whole card, not the allocator's limit.
        options += ["--reserve-vram", f"{(card_bytes - SMALL_CARD) / GIB:.2f}"]
    return options


def by_name(functions: Sequence[str]) -> Mapping[str, Check]:
    """Function -> its check."""
    return {check.function: check for check in CHECKS if check.function in functions}
