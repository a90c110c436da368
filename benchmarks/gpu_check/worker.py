"""One process with ComfyUI inside: runs checks one after the other and records their rows.

    python -m benchmarks.gpu_check.worker COMFYUI BASE ROWS CHECK... [--small] [-- FLAG...]

ROWS gets one JSON object per line: {"begin": check}, the check's rows, {"end": check}. So the
parent process knows which check was running if this one is killed or dies of a device error.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .plan import Check, by_name
from .report import FAIL, NOT_HERE, NotHere, Row

ROOT = Path(__file__).resolve().parents[2]
BROKEN_DEVICE = 3
"""Exit status after an error that makes the device unusable for this process."""


def start(comfyui: Path, base: Path, flags: Iterable[str]) -> Any:
    """Import ComfyUI as `python main.py FLAGS` does, short of serving, and load the pack into it.

    PyTorch must not be imported before: ComfyUI chooses its allocator by an environment variable.
    """
    for folder in ("models/easyref", "models/LLM", "custom_nodes", "input", "output", "temp"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(comfyui))
    # Last in the path: the pack's folder `nodes` must not hide ComfyUI's module.
    sys.path += [str(ROOT / "tests" / "comfy"), str(ROOT / "tests")]
    arguments, sys.argv = sys.argv, ["main.py", "--base-directory", str(base), *flags]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import cuda_malloc  # noqa: F401  main.py does so only when it is the program
        import main  # chooses the class of model patchers, dynamic VRAM included

        import nodes
    finally:
        sys.argv = arguments
    for module in (main, nodes, comfy.options):
        if not Path(module.__file__).is_relative_to(comfyui):
            raise ImportError(f"{module} shadows ComfyUI's")
    import comfyhost

    return comfyhost.load_pack(base)


def run(check: Check, bench: Any, find: Callable[[str], Any]) -> Iterator[Row]:
    """A check's rows; an exception becomes a failed row with its text."""
    import torch

    began = time.perf_counter()
    try:
        with torch.inference_mode():
            for row in find(check.function)(bench):
                yield without_verdict_on_cpu(
                    replace(row, check=check.name), check, bench.gpu and not bench.small
                )
    except NotHere as reason:
        yield Row(check.name, "whole check", verdict=NOT_HERE, note=str(reason))
    except Exception as error:
        yield Row(check.name, "whole check", verdict=FAIL, note=describe(error))
        traceback.print_exc()
        bench.drop()
        error.__traceback__ = None  # it holds the check's tensors
        if is_broken(error):
            raise
    seconds = time.perf_counter() - began
    yield Row(check.name, "time of the check", round(seconds, 1), "s")


def without_verdict_on_cpu(row: Row, check: Check, real: bool) -> Row:
    """The row; without a verdict if the check needs a GPU and models of real size."""
    if real or not check.gpu_only:
        return row
    return replace(row, verdict=NOT_HERE, note=row.note or "only its logic was tried")


def describe(error: BaseException) -> str:
    """Error and place on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}{where}".split())


def is_broken(error: BaseException) -> bool:
    """Whether the device may be unusable afterwards; out of memory leaves it usable."""
    import torch

    accelerator = getattr(torch, "AcceleratorError", None)
    return accelerator is not None and isinstance(error, accelerator)


def find(function: str) -> Any:
    """The function named by "module:function"."""
    module, name = function.split(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)


def main() -> int:
    own, flags = sys.argv[1:], []
    if "--" in own:
        split = own.index("--")
        own, flags = own[:split], own[split + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("functions", nargs="+")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(own)
    checks = by_name(options.functions)
    with options.rows.open("a", encoding="utf-8") as file:

        def record(content: dict[str, Any]) -> None:
            file.write(json.dumps(content) + "\n")
            file.flush()

        pack = start(options.comfyui, options.base, flags)
        from .bench import Bench
        from .models import small_unet_recognised

        bench = Bench(pack, options.base, options.small)
        bench.write_models()
        with small_unet_recognised(pack):
            for function in options.functions:
                record({"begin": function})
                try:
                    for row in run(checks[function], bench, find):
                        record(row.written())
                except Exception:
                    record({"end": function})
                    return BROKEN_DEVICE
                record({"end": function})
                gc.collect()
                bench.free()
    return 0


if __name__ == "__main__":
    sys.exit(main())
