"""The last lines of a test run: how many ComfyUI tests ran, against which, and what was skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
SOURCE = """
import pytest

def test_that_runs():
    pass

@pytest.mark.parametrize("n", [1, 2])
def test_that_does_not(n):
    pytest.skip("no such pack")
"""


@pytest.mark.slow
def test_what_ran_and_what_did_not_comes_last_and_is_kept(tmp_path: Path) -> None:
    core = tmp_path / "core"
    (core / "comfy").mkdir(parents=True)
    (core / "main.py").touch()
    (core / "comfy" / "model_patcher.py").touch()
    (core / "comfyui_version.py").write_text('__version__ = "0.8.0"\n', encoding="utf-8")
    root = tmp_path / "root"
    for folder in ("comfy", "other"):
        (root / folder).mkdir(parents=True)
        (root / folder / f"test_{folder}.py").write_text(SOURCE, encoding="utf-8")
    (root / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    kept = tmp_path / "summary.txt"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent))),
        "COMFYUI_PATH": str(core),
        "EASYREF_SUMMARY": str(kept),
    }
    wanted = ["ComfyUI tests: 1 ran against ComfyUI 0.8.0, 2 skipped", "  2 skipped: no such pack"]
    processes = ([], ["-n", "2"])
    for times, shared in enumerate(processes, 1):  # of several runs all are kept
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "skips_summary", "-q", *shared, "."],
            cwd=root,
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-2:] == wanted
        assert kept.read_text(encoding="utf-8").splitlines() == times * wanted
