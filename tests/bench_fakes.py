"""Tiny groups, and a method and a metric that need no model."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.methods import Generated
from easyref_core.evaluation.metrics import Column
from easyref_core.evaluation.run import BenchSummary, run_bench
from easyref_core.evaluation.settings import BenchSettings, make_bench_settings
from easyref_core.evaluation.trials import Trial

SIDE = 8  # pixels
_TIMED = ("times.csv", "pictures.json", "index.html", ".lock")


def picture(path: Path, seed: int, side: int = SIDE) -> Path:
    """A picture of noise, which no other seed gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_groups(folder: Path, sizes: Mapping[str, int]) -> Path:
    """Groups of different pictures, with captions beside them; names may have a split before."""
    for number, (name, size) in enumerate(sizes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(size):
            path = picture(folder / name / f"{index}.png", 1000 * number + index)
            path.with_suffix(".txt").write_text(f"picture {index} of {Path(name).name}")
    return folder


class FakeMethod:
    """Draws what it is given; `act` may fail or wait before each batch."""

    def __init__(self, name: str, act: Callable[[Sequence[Trial]], Any] | None = None) -> None:
        self.name = name
        self.calls: list[list[str]] = []
        self.closed = 0
        self._act = act or (lambda trials: None)

    def identity(self) -> dict[str, Any]:
        return {"file": self.name, "version": (1, 2)}

    def generate(self, trials: Sequence[Trial], work: Path) -> list[Generated]:
        self.calls.append([trial.path for trial in trials])
        given = self._act(trials)
        return given or [Generated(drawn(trial), {"sample": 0.5}) for trial in trials]

    def close(self) -> None:
        self.closed += 1


def drawn(trial: Trial) -> Image.Image:
    """Pixels of all that a trial says."""
    names = [str(picture.source.path.name) for picture in trial.references]
    text = repr((trial.variant, names, trial.prompt, trial.seed, trial.group))
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class FakeMetric:
    """Mean level, and the mean level again for images that have a prompt."""

    def __init__(self, version: int = 1) -> None:
        self.columns = (
            Column("level", "Level", "0 to 1", None, (("100 x", 100.0),)),
            Column("told", "Told", "0 to 1"),
        )
        self.scored: list[str] = []
        self._version = version

    def identity(self) -> dict[str, Any]:
        return {"name": "level", "version": self._version}

    def score(
        self, trials: Sequence[Trial], images: Sequence[Image.Image]
    ) -> list[dict[str, float]]:
        self.scored += [trial.path for trial in trials]
        levels = [float(np.asarray(image).mean()) / 255 * self._version for image in images]
        return [
            {"level": level} | ({"told": level} if trial.prompt else {})
            for trial, level in zip(trials, levels, strict=True)
        ]


def settings_for(folder: Path, vary: Sequence[str] = (), **more: Any) -> BenchSettings:
    """Groups in `folder`/groups, a run in `folder`/run, the methods easyref and none."""
    given = {
        "groups": str(folder / "groups"),
        "out": str(folder / "run"),
        "methods": ["easyref", "none"],
        "device": "cpu",
    }
    return make_bench_settings({**given, **more}, vary)


def bench(
    settings: BenchSettings,
    act: Callable[[Sequence[Trial]], Any] | None = None,
    metrics: Sequence[Any] | None = None,
    made: dict[str, FakeMethod] | None = None,
    page: bool = False,
    **more: Any,
) -> BenchSummary | None:
    """Run with fake methods, which `made` gets, and fake metrics; the page takes seconds."""

    def methods(_: Any, trials: Sequence[Trial], device: torch.device) -> dict[str, FakeMethod]:
        found = {name: FakeMethod(name, act) for name in settings.methods}
        if made is not None:
            made.update(found)
        return found

    scored = [FakeMetric()] if metrics is None else metrics
    metrics_made = scored, ["DINO is missing."]
    given = {"make_methods": methods, "make_metrics": lambda *_: metrics_made, **more}
    if page:
        return run_bench(settings, **given)
    with mock.patch("easyref_core.evaluation.page.write.write_page"):
        return run_bench(settings, **given)


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files of a run that do not depend on time, by name."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _TIMED
    }
    for name, content in found.items():
        if name.startswith("images/") and name.endswith(".json"):
            found[name] = json.dumps(json.loads(content) | {"seconds": 0}).encode()
    return found


def timeless(found: Mapping[str, bytes]) -> dict[str, Any]:
    """A snapshot without times and the run's own place, for runs in different places."""
    plain: dict[str, Any] = dict(found)
    for name in ("results.json", "run.json"):
        plain[name] = json.loads(found[name])
        plain[name]["settings"].pop("out")
        for summary in plain[name].get("summaries", []):
            summary.pop("seconds")
    return plain


def main() -> None:
    """As a program, for tests that kill it: FOLDER SECONDS-A-BATCH [SETTINGS as JSON]."""
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    more = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    out = os.environ.get(f"OUT_OF_{os.environ.get('RANK', '0')}")  # a place of this process
    more |= {"out": out} if out else {}
    try:
        summary = bench(settings_for(folder, **more), lambda trials: time.sleep(seconds))
    except EasyRefError as error:
        sys.exit(str(error))
    if summary is not None:
        print(summary.done)


if __name__ == "__main__":
    main()
