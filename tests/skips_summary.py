"""A pytest plugin whose lines come last: how many ComfyUI tests ran, how many did not, and why.

PYTHONPATH=tests python -m pytest -p skips_summary tests

EASYREF_SUMMARY   a file to which the lines are added too, for runs of several ComfyUIs
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from workshop.comfyui.find_comfyui import comfyui_version, find_comfyui

_FOLDERS = ("comfy/", "server/", "browser/")


class Tally:
    """Counts the tests of the folders that need ComfyUI."""

    def __init__(self) -> None:
        self.ran: set[str] = set()
        self.reasons: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._count(report, report.when == "call")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        # A file that was left out as a whole counts once: its tests were never seen.
        self._count(report, False)

    def _count(self, report: Any, finished: bool) -> None:
        if not report.nodeid.startswith(_FOLDERS):
            return
        if report.skipped and not hasattr(report, "wasxfail"):
            self.reasons[_reason(report)] += 1
        elif finished or report.failed:
            self.ran.add(report.nodeid)


def _reason(report: Any) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ").strip()


def summary(ran: int, reasons: Iterable[tuple[str, int]]) -> list[str]:
    """The closing lines."""
    reasons = list(reasons)
    found = find_comfyui()
    against = f"against ComfyUI {comfyui_version(found)}" if found is not None else "without any"
    skipped = sum(count for _, count in reasons)
    lines = [f"ComfyUI tests: {ran} ran {against}, {skipped} skipped"]
    return lines + [f"  {count} skipped: {reason}" for reason, count in reasons]


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a process of xdist reports to the one that counts
        config.pluginmanager.register(Tally(), "easyref-tally")


def pytest_unconfigure(config: pytest.Config) -> None:
    # Later than the terminal's own summary line.
    tally: Tally | None = config.pluginmanager.get_plugin("easyref-tally")
    terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
    if tally is None or terminal is None or not (tally.ran or tally.reasons):
        return
    lines = summary(len(tally.ran), tally.reasons.most_common())
    for line in lines:
        terminal.write_line(line)
    if "EASYREF_SUMMARY" in os.environ:
        with Path(os.environ["EASYREF_SUMMARY"]).open("a", encoding="utf-8") as kept:
            kept.writelines(f"{line}\n" for line in lines)
