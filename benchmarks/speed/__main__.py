"""Measures, prints the table, draws the plot, and says by its status whether all bars are met."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from workshop.comfyui.find_comfyui import find_comfyui

from .encoding import COUNTS, COUNTS_ON_GPU, by_count, changes, pooled_changes
from .models import Sizes, random_encoder
from .plot import draw
from .sampling import sampling
from .timing import Row


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    help_comfyui = "times EasyRef Apply, on a CPU; default: the ComfyUI that is found"
    parser.add_argument("--comfyui", type=Path, metavar="FOLDER", help=help_comfyui)
    parser.add_argument("--small", action="store_true", help="try the logic, in seconds")
    options = parser.parse_args()
    out = options.out.resolve()  # ComfyUI starts in its own folder
    device = torch.device(options.device)
    on_cpu = device.type == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    # A quarter of the layers on a CPU: shares stay the same, and it takes minutes.
    sizes = Sizes(7, 8, options.small) if on_cpu else Sizes(28, 32, options.small)
    dtype = torch.float32 if on_cpu else torch.bfloat16
    encoder = random_encoder(sizes, device, dtype)
    rows = changes(encoder, device, options.repeats)
    rows += pooled_changes(encoder, device, options.repeats)
    comfyui = options.comfyui or find_comfyui()
    if comfyui is not None and on_cpu and not options.small:
        rows += sampling(comfyui.resolve(), out / "comfyui", options.repeats)
    counts = by_count(encoder, device, COUNTS if on_cpu else COUNTS_ON_GPU)
    found = {
        "machine": _machine(device),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "layers": [sizes.layers, sizes.depth],
        "dtype": str(dtype).removeprefix("torch."),
        "rows": [asdict(row) | {"met": row.met} for row in rows],
        "seconds by references": counts,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "speed.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table = as_table(found, rows)
    (out / "speed.md").write_text(table, encoding="utf-8")
    draw(rows, counts, out / "speed.png")
    print(table)
    return 0 if all(row.met for row in rows) else 1


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"one thread of a {platform.machine()} CPU"


def as_table(found: dict[str, Any], rows: list[Row]) -> str:
    """Markdown."""
    decoder, vision = found["layers"]
    lines = [
        f"{found['machine']}, {found['dtype']}, torch {found['versions']['torch']}, "
        f"{decoder} decoder layers, {vision} vision blocks",
        "",
        "| change after 8 references | share of that | of its multiplications | bar | met |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        share = f"{row.share:.3f} ± {row.spread:.3f}"
        met = "yes" if row.met else "NO"
        counted = "" if row.multiplications is None else f"{row.multiplications:.3f}"
        cells = (row.measure, share, counted, f"{row.bar:g}", met)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| references | seconds |", "| --- | --- |"]
    lines += [f"| {n} | {s:.2f} |" for n, s in found["seconds by references"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
