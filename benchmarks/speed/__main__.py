"""Measures, prints the table, draws the plot, and says by its status whether all bars are met."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from workshop.comfyui.find_comfyui import find_comfyui

from .encoding import COUNTS, DEVIATION, by_count, changes, pooled_changes, straight_line
from .full_memory import full_memory
from .growth import growth
from .inspecting import inspecting
from .models import Sizes, random_encoder
from .official import compared
from .peak_memory import peak_memory
from .plot import draw
from .processes import IS_LINUX
from .products import products
from .sampling import sampling
from .sampling_memory import sampling_memory
from .table import as_table
from .timing import Amount


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    help_comfyui = "measures sampling, on a CPU; default: the ComfyUI that is found"
    parser.add_argument("--comfyui", type=Path, metavar="FOLDER", help=help_comfyui)
    help_ipadapter = "a checkout of cubiq/ComfyUI_IPAdapter_plus, to be measured beside"
    parser.add_argument("--ipadapter", type=Path, metavar="FOLDER", help=help_ipadapter)
    help_easyref = "a checkout of TempleX98/EasyRef, whose attention processors are measured beside"
    parser.add_argument("--easyref", type=Path, metavar="FOLDER", help=help_easyref)
    help_official = "transformers 4.45.2, for the official procedure: pip install --target FOLDER"
    parser.add_argument("--official", type=Path, metavar="FOLDER", help=help_official)
    help_real_size = "with --official: memory of encoding too; 10 GB on the disk, 16 in memory"
    parser.add_argument("--real-size", action="store_true", help=help_real_size)
    help_full = "a step while this computer's memory is filled up; close what matters before"
    parser.add_argument("--full-memory", action="store_true", help=help_full)
    parser.add_argument("--small", action="store_true", help="try the logic, in seconds")
    options = parser.parse_args()
    if options.real_size and options.official is None:
        parser.error("--real-size compares with --official, which is missing")
    out = options.out.resolve()  # ComfyUI starts in its own folder
    device = torch.device(options.device)
    on_cpu = device.type == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    # Fewer layers on a CPU: shares stay about the same, and it takes minutes.
    sizes = Sizes(7, 8, options.small) if on_cpu else Sizes(28, 32, options.small)
    fewer = Sizes(3, 2, options.small) if on_cpu else sizes
    dtype = torch.float32 if on_cpu else torch.bfloat16
    amounts: list[Amount] = []
    comfyui = options.comfyui or find_comfyui()
    comfyui, work = comfyui and comfyui.resolve(), out / "comfyui"
    in_comfyui = comfyui is not None and on_cpu and not options.small
    if IS_LINUX and in_comfyui and options.full_memory:  # before this process takes any itself
        amounts += full_memory(comfyui, work)
    encoder = random_encoder(sizes, device, dtype)
    rows = changes(encoder, device, options.repeats)
    rows += pooled_changes(encoder, device, options.repeats)
    if options.official is not None and on_cpu and not options.small:
        amounts += compared(options.official.resolve(), encoder, sizes, options.repeats)
    if on_cpu and not options.small:
        amounts += products(encoder, options.repeats)
    if fewer != sizes:
        encoder = random_encoder(fewer, device, dtype)
    counts = by_count(encoder, device, COUNTS, options.repeats)
    del encoder
    deviation = straight_line(counts)[2]
    amounts += [Amount("by references: off a straight line", deviation, "", DEVIATION)]
    if IS_LINUX and on_cpu:
        amounts += inspecting(out, options.repeats)
    if in_comfyui:
        amounts += sampling_memory(comfyui, work)
        if options.real_size:
            amounts += peak_memory(comfyui, work, options.official.resolve())
        if IS_LINUX:
            amounts += growth(comfyui, work)
        peer = None if options.ipadapter is None else options.ipadapter.resolve()
        processors = None if options.easyref is None else options.easyref.resolve()
        rows += sampling(comfyui, work, options.repeats, peer, processors)
    found = {
        "machine": _machine(device),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "layers": [sizes.layers, sizes.depth],
        "layers by references": [fewer.layers, fewer.depth],
        "dtype": str(dtype).removeprefix("torch."),
        "rows": [asdict(row) | {"met": row.met} for row in rows],
        "amounts": [asdict(one) | {"met": one.met} for one in amounts],
        "by references": counts,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "speed.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table = as_table(found, rows, amounts)
    (out / "speed.md").write_text(table, encoding="utf-8")
    draw(rows, amounts, counts, out / "speed.png")
    print(table)
    return 0 if all(one.met for one in (*rows, *amounts)) else 1


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"one thread of a {platform.machine()} CPU"


if __name__ == "__main__":
    sys.exit(main())
