"""The pack's repository as it stands now, committed or not, in a repository of its own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_COMMIT = ("-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "all")


def copy_repository(pack: Path, target: Path) -> None:
    """Copy all files that git knows or would add, and commit them; skips where there is no git."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=pack, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("the pack is no clone, so git cannot tell its files")
    for name in filter(None, done.stdout.decode().split("\0")):
        if (pack / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(pack / name, target / name)
    for arguments in (("init", "-q"), ("add", "-A"), _COMMIT):
        run(["git", *arguments], target)


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Run a command that must succeed in a folder; returns its output."""
    done = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment or None,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
