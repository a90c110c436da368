"""One run of EasyRef on the demo models, through ComfyUI where there is one, else diffusers."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ..errors import EasyRefError
from .comfy_backend import make_pictures as make_with_comfyui
from .find_comfyui import PACK, find_comfyui
from .parts import Material, Pictures, draw_material
from .sheet import draw_sheet
from .tiny import TRAINED_SET, is_trained

OUT = PACK / "demo" / "out"


def main() -> int:
    """Make the pictures and the sheet; returns the exit status."""
    start = time.monotonic()
    try:
        material = draw_material()
        sheet = write_results(material, _make_pictures(material), OUT)
    except EasyRefError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(f"{sheet} ({time.monotonic() - start:.0f} seconds)")
    if not is_trained(TRAINED_SET):
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


def write_results(material: Material, pictures: Pictures, folder: Path) -> Path:
    """Write all parts and the sheet; returns the sheet's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, group in (("reference", material.references), ("other", material.others)):
        for number, picture in enumerate(group, 1):
            picture.save(folder / f"{stem}_{number}.png")
    material.control.save(folder / "control.png")
    for name, picture in pictures.named().items():
        picture.save(folder / f"{name}.png")
    path = folder / "sheet.png"
    draw_sheet(material, pictures, is_trained(TRAINED_SET)).save(path)
    return path
