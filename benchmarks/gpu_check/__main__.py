"""The command; see the package's docstring, or `python -m benchmarks.gpu_check --help`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from easyref_core.errors import EasyRefError
from easyref_core.files import check_output
from easyref_core.untrusted import read_json
from workshop.comfyui.find_comfyui import comfyui_version, find_comfyui, is_comfyui

from . import plan
from .report import FAIL, NOT_HERE, Row, measured, summary, table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
WHOLE_RUN = 480
"""Time limit of all checks together, in seconds."""

_START_SECONDS = 180  # until the first check begins: imports, and writing the models
_PROBE = """
import importlib.metadata, json, platform, torch
def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
cuda = torch.cuda.is_available()
card = torch.cuda.get_device_properties(0) if cuda else None
print(json.dumps({
    "card": card.name if cuda else None,
    "card_bytes": card.total_memory if cuda else 0,
    "compute_capability": f"{card.major}.{card.minor}" if cuda else None,
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    **{name: version(name) for name in ("triton", "comfy-aimdo", "comfy-kitchen")},
    "python": platform.python_version(),
    "system": platform.system(),
}))
"""


@dataclass
class Run:
    """The workers of one command and the rows they recorded.

    Attributes:
        base: ComfyUI's base directory, the models in it.
        about: result of `probe`.
        rows: so far.
        worker: command of a worker, without its arguments.
    """

    comfyui: Path
    base: Path
    about: dict[str, Any]
    small: bool
    rows: list[Row] = field(default_factory=list)
    worker: Sequence[str] = (sys.executable, "-m", "benchmarks.gpu_check.worker")

    @property
    def cpu(self) -> bool:
        return self.about["card"] is None

    def all(self, checks: Sequence[plan.Check]) -> None:
        """Run checks, one process per set of ComfyUI options, and a new one after a crash."""
        known = (self.comfyui / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        # A CPU has only one set of options, so one process.
        groups = {plan.USUAL: list(checks)} if self.cpu else plan.starts(checks)
        for start, group in groups.items():
            flags: Sequence[str] | str = ["--cpu"]
            if not self.cpu:
                flags = plan.flags(start, self.about["card_bytes"], known)
            if isinstance(flags, str):
                for check in group:
                    self.add(Row(check.name, start, verdict=NOT_HERE, note=flags))
                continue
            left = list(group)
            while left:
                left = self._process(start, flags, left)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        value = "" if row.value is None else f" {row.value:.4g} {row.unit}"
        print(f"{row.check}: {row.name}{value}: {row.verdict} {row.note}".rstrip(), file=sys.stderr)

    def _process(
        self, start: str, flags: Sequence[str], checks: Sequence[plan.Check]
    ) -> list[plan.Check]:
        """Run checks in one worker; returns those that it did not reach."""
        file = self.base / "rows.jsonl"
        file.write_text("")
        command = [*self.worker, str(self.comfyui), str(self.base), str(file)]
        command += [check.function for check in checks]
        command += (["--small"] if self.small else []) + ["--", *flags]
        # Empty compile caches, deleted with the models: nothing compiled earlier is used.
        caches = {
            f"{name}_CACHE_DIR": str(self.base / name.lower())
            for name in ("TORCHINDUCTOR", "TRITON")
        }
        log = self.base / "worker.log"
        with log.open("w", encoding="utf-8") as output:
            worker = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **caches},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                progress = self._follow(worker, file, start, checks)
            finally:
                worker.kill()  # nothing where it has ended by itself
                worker.wait()
        left, current, timed_out = progress
        if timed_out:
            reason = "it took too long and was ended"
        else:
            reason = f"the process ended with status {worker.returncode}"
        note = f"{reason}: {_last_lines(log)}"
        if current is not None:
            self.add(Row(current.name, "whole check", verdict=FAIL, note=note))
        elif len(left) == len(checks):
            for check in left:
                said = f"ComfyUI did not start, {note}"
                self.add(Row(check.name, "whole check", verdict=FAIL, note=said))
            return []
        return left

    def _follow(
        self,
        worker: subprocess.Popen[bytes],
        file: Path,
        start: str,
        checks: Sequence[plan.Check],
    ) -> tuple[list[plan.Check], plan.Check | None, bool]:
        """Read a worker's rows until it ends or times out.

        Returns:
            The checks that it did not reach, the one it was running, and whether it timed out.
        """
        left, read = list(checks), 0
        current: plan.Check | None = None
        limit = time.monotonic() + _START_SECONDS
        while True:
            ended = worker.poll() is not None  # before reading, so that no last line is missed
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            for line in lines[read:]:
                if not line.endswith("\n"):
                    break  # still being written
                read += 1
                content = json.loads(line)
                if "begin" in content:
                    current = left.pop(0)
                    limit = time.monotonic() + current.seconds
                elif "end" in content:
                    current = None
                    limit = time.monotonic() + _START_SECONDS
                else:
                    self.add(_of_start(Row(**content), start, self.cpu))
            if ended:
                return left, current, False
            if time.monotonic() > limit:
                return left, current, True
            time.sleep(0.1)


def _last_lines(log: Path, count: int = 3) -> str:
    """The end of a worker's output on one line, without colour codes."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return re.sub(r"\x1b\[[0-9;]*m", "", " | ".join(line.strip() for line in lines[-count:]))


def _of_start(row: Row, start: str, cpu: bool) -> Row:
    """The row; if its check runs with several sets of options, its name says with which."""
    several = len({check.start for check in plan.CHECKS if check.name == row.check}) > 1
    if cpu or not several or row.check == "dynamic":
        return row
    return Row(**{**row.written(), "name": f"{row.name} ({start})"})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description="Checks that need a GPU and a ComfyUI; nothing is downloaded.",
    )
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder; searched for by default")
    parser.add_argument(
        "--out", type=Path, help="JSON to write; by default benchmarks/results/<card>.json"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results that --out names")
    parser.add_argument(
        "--only", action="append", default=[], choices=plan.NAMES, help="run this check alone"
    )
    parser.add_argument(
        "--small", action="store_true", help="tiny models, to try the checks' logic, on a CPU too"
    )
    parser.add_argument("--work", type=Path, help="folder for 16 GB of models, kept afterwards")
    options = parser.parse_args(arguments)
    if options.out is not None:
        try:
            check_output(options.out, "results of this", is_results, overwrite=options.overwrite)
        except EasyRefError as error:
            parser.error(str(error))
    comfyui = options.comfyui.resolve() if options.comfyui else find_comfyui()
    if comfyui is None or not is_comfyui(comfyui):
        parser.error("there is no ComfyUI: set COMFYUI_PATH or give --comfyui")
    about = probe(comfyui)
    if about["card"] is None and not options.small:
        parser.error("PyTorch finds no GPU here; --small tries the checks' logic on a CPU")
    began = time.monotonic()
    with ExitStack() as stack:
        if options.work:
            base = options.work.resolve()
            base.mkdir(parents=True, exist_ok=True)
        else:
            folder = tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True)
            base = Path(stack.enter_context(folder))
        run = Run(comfyui, base, about, options.small)
        run.all(plan.chosen(options.only))
    seconds = time.monotonic() - began
    if not options.only and not options.small:
        whole = measured("all checks", seconds, "s", at_most=WHOLE_RUN)
        run.add(Row(**{**whole.written(), "check": "time"}))
    out = options.out
    if out is None and not options.small and not options.only:
        out = RESULTS / f"{slug(about['card'])}.json"
    if out is not None:
        write(out, run, seconds)
        print(f"written to {out}", file=sys.stderr)
    print(table(run.rows))
    counts = summary(run.rows)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if counts[FAIL] else 0


def probe(comfyui: Path) -> dict[str, Any]:
    """Card, driver and versions, from a separate process: this one must not use the card."""
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True
    )
    about = json.loads(done.stdout.splitlines()[-1])
    about["driver"] = _driver() if about["card"] else None
    about["comfyui"] = comfyui_version(comfyui)
    return about


def slug(card: str) -> str:
    """A card's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "_", card.lower()).strip("_")


def is_results(path: Path) -> bool:
    """Whether a file is one of `write`."""
    try:
        content = read_json(path)
    except EasyRefError:
        return False
    return isinstance(content, dict) and {"card", "rows"} <= content.keys()


def write(path: Path, run: Run, seconds: float) -> None:
    """Write all measurements, and the machine they were made on."""
    content = {
        **run.about,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "small": run.small,
        "seconds": round(seconds, 1),
        "passed": summary(run.rows)[FAIL] == 0,
        "rows": [row.written() for row in run.rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _driver() -> str | None:
    """Driver version reported by nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


if __name__ == "__main__":
    sys.exit(main())
