"""What `easyref inspect` takes for an adapter of released size, beyond importing PyTorch.

    python -m benchmarks.speed.inspecting [FILE]

measures itself while it inspects the file, or only imports PyTorch, and prints JSON.
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
        folder: where the file may lie for the time; it takes no room on a disk that knows sparse
            files.
    """
    sys.path.append(str(ROOT / "tests"))
    from goldens import real_shapes, sparse_file

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        adapter = sparse_file(Path(work) / "adapter.safetensors", real_shapes())
        size = adapter.stat().st_size / 1e9
        alone = [in_process("inspecting") for _ in range(repeats)]
        inspected = [in_process("inspecting", str(adapter)) for _ in range(repeats)]
    name = f"easyref inspect, {size:.1f} GB"
    found = []
    for unit, bar in (("s", SECONDS), ("MB", MEGABYTES)):
        torch = [one[unit] for one in alone]
        whole = [one[unit] for one in inspected]
        more = [w - t for w, t in zip(whole, torch, strict=True)]
        found += [
            amount(f"{name}: beyond torch", more, unit, bar),
            amount(f"{name}: in all", whole, unit),
            amount("import torch alone", torch, unit),
        ]
    return found


def _measure(arguments: list[str]) -> dict[str, float]:
    if arguments:
        from easyref_core.cli import main

        with redirect_stdout(io.StringIO()) as text:
            status = main(["inspect", *arguments])
        if status or not text.getvalue():
            raise SystemExit(f"easyref inspect ended with status {status}")
    else:
        import torch  # noqa: F401
    return {"s": time.process_time(), "MB": peak_bytes() / 1e6}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1:])))
