"""The command `run`: EasyRef on the demo models, in ComfyUI if there is one, else in diffusers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ..comfyui.find_comfyui import PACK, find_comfyui
from .comfy_backend import make_images as make_with_comfyui
from .predictions import RowPredictions, attribute_table, classify_results
from .references import read_rows
from .rows import DemoImages, DemoInputs
from .sheet import draw_sheet

OUT = PACK / "demo" / "out"


def run_demo() -> None:
    """Sample the images, write them and the sheet into `OUT`, and print the attribute table.

    Raises:
        EasyRefError: a file of the demo that is missing or broken; a ComfyUI that does not run.
    """
    start = time.monotonic()
    inputs = DemoInputs(read_rows())
    images = _make_images(inputs)
    predictions = classify_results(inputs, images)
    sheet = write_results(inputs, images, predictions, OUT)
    print(f"\n{attribute_table(inputs, predictions)}\n")
    print(f"{sheet} ({time.monotonic() - start:.0f} seconds)")


def _make_images(inputs: DemoInputs) -> DemoImages:
    comfyui = find_comfyui()
    if comfyui is not None:
        print(f"running the workflows in ComfyUI ({comfyui})", flush=True)
        return make_with_comfyui(comfyui, inputs)
    from .diffusers_backend import make_images as make_with_diffusers

    print("no ComfyUI found: running with diffusers", flush=True)
    return make_with_diffusers(inputs)


def write_results(
    inputs: DemoInputs, images: DemoImages, predictions: Sequence[RowPredictions], folder: Path
) -> Path:
    """Write the sheet and, in a folder per row, its images; returns the sheet's path."""
    for row, results in zip(inputs.rows, images.rows, strict=True):
        row_folder = folder / row.name
        row_folder.mkdir(parents=True, exist_ok=True)
        for number, reference in enumerate(row.references, 1):
            reference.save(row_folder / f"reference_{number}.png")
        row.outline.save(row_folder / "outline.png")
        for name, image in results.named().items():
            image.save(row_folder / f"{name}.png")
    path = folder / "sheet.png"
    draw_sheet(inputs, images, predictions).save(path)
    return path
