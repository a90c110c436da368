"""What `easyref inspect` takes in all for an adapter of released size, plain and in scaled fp8.

    python -m benchmarks.speed.inspecting FILE

measures itself from its start to the end of inspecting the file, and prints JSON.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

from .processes import ROOT, in_process, peak_bytes
from .timing import Amount, amount

SECONDS, MEGABYTES = 1.0, 200.0


def inspecting(folder: Path, repeats: int) -> list[Amount]:
    """Amounts of the table.

    Args:
        folder: where a file may lie for the time; it takes no room on a disk that knows sparse
            files.
    """
    sys.path.append(str(ROOT / "tests"))
    from goldens import real_shapes, sparse_file

    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for kind, fp8 in (("", False), (" in scaled fp8", True)):
        with tempfile.TemporaryDirectory(dir=folder) as work:
            adapter = sparse_file(Path(work) / "adapter.safetensors", real_shapes(), fp8=fp8)
            size = adapter.stat().st_size / 1e9
            taken = [in_process("inspecting", str(adapter)) for _ in range(repeats)]
        name = f"easyref inspect, {size:.1f} GB{kind}"
        for unit, bar in (("s", SECONDS), ("MB", MEGABYTES)):
            found.append(amount(name, [one[unit] for one in taken], unit, bar))
    return found


def _measure(file: str) -> dict[str, float]:
    from easyref_core.cli import main

    with redirect_stdout(io.StringIO()) as text:
        status = main(["inspect", file])
    if status or not text.getvalue():
        raise SystemExit(f"easyref inspect ended with status {status}")
    return {"s": time.process_time(), "MB": peak_bytes() / 1e6}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1])))
