"""Parts that need a process of their own, and what a process takes.

Nothing here imports PyTorch, so that a part can measure its own imports.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_STATUS, _STATM = Path("/proc/self/status"), Path("/proc/self/statm")

IS_LINUX = _STATM.is_file()
"""Whether the memory of a process can be read here."""


def in_process(part: str, *arguments: str, environment: dict[str, str] | None = None) -> Any:
    """What a module of this package prints as JSON in its last line.

    Raises:
        subprocess.CalledProcessError: it failed; what it said is on stderr.
    """
    command = [sys.executable, "-m", f"{__package__}.{part}", *arguments]
    settings = os.environ | (environment or {})
    done = subprocess.run(
        command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def give_back_free() -> None:
    """Have the C library give back what is freed, where it can: glibc holds 200 MB and more for
    later, which goes up and down from prompt to prompt."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def resident_bytes() -> int:
    """Memory of this process now, mapped files included."""
    return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reset_peak() -> None:
    """Have `peak_bytes` count from now on."""
    give_back_free()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """The most that it was since the program began, or since `reset_peak`. `getrusage` would tell
    the parent's, too."""
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
