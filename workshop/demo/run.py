"""One run of EasyRef on the demo models, through ComfyUI where there is one, else diffusers."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from easyref_core.demo_set import TRAINED_SET, is_trained
from easyref_core.errors import EasyRefError

from ..comfyui.find_comfyui import PACK, find_comfyui
from .comfy_backend import make_pictures as make_with_comfyui
from .parts import Material, Pictures
from .readings import RowReadings, attribute_table, read_results
from .references import read_rows
from .sheet import draw_sheet

OUT = PACK / "demo" / "out"


def main() -> int:
    """Make the pictures, the sheet and the table; returns the exit status."""
    start = time.monotonic()
    trained = is_trained(TRAINED_SET)
    try:
        # Noise looks the same in every row.
        material = Material(read_rows() if trained else read_rows()[:1])
        pictures = _make_pictures(material)
        readings = read_results(material, pictures) if trained else None
        sheet = write_results(material, pictures, OUT, trained, readings)
    except EasyRefError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    if readings is not None:
        print(f"\n{attribute_table(material, readings)}\n")
    print(f"{sheet} ({time.monotonic() - start:.0f} seconds)")
    if not trained:
        print(
            "The demo models are untrained: the results are noise, which shows that the path "
            "works and that the references change the picture, nothing more."
        )
    return 0


def _make_pictures(material: Material) -> Pictures:
    comfyui = find_comfyui()
    if comfyui is not None:
        print(f"running the workflows in ComfyUI ({comfyui})", flush=True)
        return make_with_comfyui(comfyui, material)
    from .diffusers_backend import make_pictures as make_with_diffusers

    print("no ComfyUI found: running with diffusers", flush=True)
    return make_with_diffusers(material)


def write_results(
    material: Material,
    pictures: Pictures,
    folder: Path,
    trained: bool,
    readings: Sequence[RowReadings] | None = None,
) -> Path:
    """Write the sheet and, in a folder for each row, its parts; returns the sheet's path."""
    for row, made in zip(material.rows, pictures.rows, strict=True):
        parts = folder / row.name
        parts.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(row.references, 1):
            picture.save(parts / f"reference_{number}.png")
        row.outline.save(parts / "outline.png")
        for name, picture in made.named().items():
            picture.save(parts / f"{name}.png")
    path = folder / "sheet.png"
    draw_sheet(material, pictures, trained, readings).save(path)
    return path
