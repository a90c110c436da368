"""Keeps the loss curves of a demo training: thinned logs, and a picture of them.

    python -m workshop.pages.make_curves [runs/demo]

Writes recipes/demo/logs/<part>.jsonl, the mean loss of each hundredth of a part's steps, and
docs/demo_curves.png.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "recipes" / "demo" / "logs"
PICTURE = ROOT / "docs" / "demo_curves.png"

_ZOOM = 3  # drawn this many times larger, then reduced, for smooth lines
_PANEL, _GAP, _COLUMNS = (300, 190), 18, 3
_PAPER, _INK, _SOFT, _LINE, _GRID = "#ffffff", "#2c2a30", "#7a7470", "#228b8d", "#e2dcd2"
_POINTS = 100

Curve = list[tuple[int, float]]


def thinned(log: Path) -> Curve:
    """(last step, mean loss) of a hundred stretches; of steps logged twice the last one counts."""
    losses: dict[int, float] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        losses[entry["step"]] = entry["loss"]
    steps = sorted(losses)
    size = max(1, len(steps) // _POINTS)
    stretches = [steps[start : start + size] for start in range(0, len(steps), size)]
    return [(part[-1], sum(losses[s] for s in part) / len(part)) for part in stretches]


def write_log(curve: Curve, path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": round(loss, 5)}) for step, loss in curve]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_log(path: Path) -> Curve:
    entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(entry["step"], entry["loss"]) for entry in entries]


def draw_curves(curves: dict[str, Curve]) -> Image.Image:
    """One panel a part."""
    rows = -(-len(curves) // _COLUMNS)
    width = _COLUMNS * (_PANEL[0] + _GAP) + _GAP
    height = rows * (_PANEL[1] + _GAP) + _GAP
    image = Image.new("RGB", (width * _ZOOM, height * _ZOOM), _PAPER)
    draw = ImageDraw.Draw(image)
    for number, (name, curve) in enumerate(curves.items()):
        left = _GAP + number % _COLUMNS * (_PANEL[0] + _GAP)
        top = _GAP + number // _COLUMNS * (_PANEL[1] + _GAP)
        _draw_panel(draw, left, top, name, curve)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _draw_panel(draw: ImageDraw.ImageDraw, left: int, top: int, name: str, curve: Curve) -> None:
    width, height = _PANEL
    x0, y0, x1, y1 = left + 44, top + 26, left + width, top + height - 20
    # The first steps would flatten all that follows.
    shown = sorted(loss for _, loss in curve[2:])
    high, low = shown[-1], min(shown[0], 0.0)
    high += (high - low) * 0.05 or 1.0
    last = curve[-1][0]

    def point(step: float, loss: float) -> tuple[float, float]:
        y = y1 - (min(loss, high) - low) / (high - low) * (y1 - y0)
        return (x0 + step / last * (x1 - x0)) * _ZOOM, y * _ZOOM

    def text(x: float, y: float, words: str, colour: str, size: int, anchor: str) -> None:
        font = ImageFont.load_default(size * _ZOOM)
        draw.text((x * _ZOOM, y * _ZOOM), words, colour, font, anchor)

    text(left, top + 2, f"{name}: {last:,} steps, loss {curve[-1][1]:.3f}", _INK, 12, "lt")
    for share in (0.0, 0.5, 1.0):
        level = low + share * (high - low)
        draw.line([point(0, level), point(last, level)], _GRID, _ZOOM)
        text(x0 - 6, point(0, level)[1] / _ZOOM, f"{level:.3f}", _SOFT, 9, "rm")
        text(x0 + share * (x1 - x0), y1 + 6, f"{round(share * last):,}", _SOFT, 9, "mt")
    draw.line([point(*p) for p in curve], _LINE, 2 * _ZOOM, joint="curve")


def main(arguments: Sequence[str]) -> None:
    """Read the named training's logs, or else the kept ones, and draw them."""
    if arguments:
        for log in Path(arguments[0]).glob("*/losses.jsonl"):
            write_log(thinned(log), LOGS / f"{log.parent.name}.jsonl")
    order = ("vae", "mllm", "base", "controlnet", "judge", "decoder")
    found = {path.stem: path for path in sorted(LOGS.glob("*.jsonl"))}
    names = [*(n for n in order if n in found), *(n for n in found if n not in order)]
    draw_curves({name: read_log(found[name]) for name in names}).save(PICTURE, optimize=True)
    print(PICTURE)


if __name__ == "__main__":
    main(sys.argv[1:])
