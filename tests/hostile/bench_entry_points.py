"""The benchmark on a home's groups and run, with a method and a metric that need no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench_fakes import bench, settings_for


def prepare() -> None:
    """Import what a run needs, once."""


def run(base: str, protocol: str = "mrbench", overwrite: str = "") -> Any:
    """Of `groups`, into `run`."""
    settings = settings_for(Path(base), protocol=protocol, images=1, methods=["none"])
    summary = bench(settings, overwrite=bool(overwrite))
    return {"done": summary.done, "failed": summary.failed, "notes": summary.notes}


def read(base: str) -> Any:
    """The trials of `run`, as the page and the comparison read them."""
    from easyref_core.evaluation.store import RunFolder

    return {"trials": len(RunFolder(Path(base) / "run").read_trials())}
