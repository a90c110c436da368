"""Loss curves of a demo training: thinned logs, and a figure of them.

    python -m workshop.pages.make_curves [runs/demo]

Writes recipes/demo/logs/<part>.jsonl, the mean loss of each hundredth of a part's steps, and
docs/demo_curves.png.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "recipes" / "demo" / "logs"
PICTURE = ROOT / "docs" / "demo_curves.png"

_COLUMNS = 4
_INK, _SOFT, _LINE, _GRID = "#2c2a30", "#7a7470", "#228b8d", "#e8e4dc"
_POINTS = 100
_FIRST = 2  # points that the range of a panel leaves out: they would flatten all that follows
_WINDOW = 9  # points of the moving average

Curve = list[tuple[int, float]]


def thinned(log: Path) -> Curve:
    """(last step, mean loss) of a hundred intervals; of steps logged twice the last one counts."""
    losses: dict[int, float] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        losses[entry["step"]] = entry["loss"]
    steps = sorted(losses)
    size = max(1, len(steps) // _POINTS)
    intervals = [steps[start : start + size] for start in range(0, len(steps), size)]
    return [(part[-1], sum(losses[s] for s in part) / len(part)) for part in intervals]


def write_log(curve: Curve, path: Path) -> None:
    """Write a curve as one JSON object per line."""
    lines = [json.dumps({"step": step, "loss": round(loss, 5)}) for step, loss in curve]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_log(path: Path) -> Curve:
    """Read what `write_log` wrote."""
    entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(entry["step"], entry["loss"]) for entry in entries]


def draw_curves(curves: Mapping[str, Curve]) -> Figure:
    """One panel per part, each with its own axes: the loss, and its moving average."""
    rows = -(-len(curves) // _COLUMNS)
    figure = Figure(figsize=(11, 2.2 * rows + 0.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.09)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for panel, (name, curve) in zip(panels, curves.items(), strict=False):
        _draw(panel, name, curve)
    for panel in panels[len(curves) :]:
        panel.remove()
    figure.supxlabel("step", color=_SOFT, fontsize=9)
    figure.supylabel("loss", color=_SOFT, fontsize=9)
    return figure


def _draw(panel: Axes, name: str, curve: Curve) -> None:
    steps, losses = zip(*curve, strict=True)
    panel.plot(steps, losses, color=_LINE, linewidth=0.9, alpha=0.4)
    panel.plot(steps, _moving_average(losses), color=_LINE, linewidth=1.8)
    low, high = min(losses), max(losses[_FIRST:])
    margin = 0.06 * (high - low)
    panel.set_ylim(low - margin, high + margin)
    panel.set_xlim(0, steps[-1])
    panel.set_title(name, loc="left", color=_INK, fontsize=9)
    panel.set_title(f"last {losses[-1]:.3f}", loc="right", color=_SOFT, fontsize=8)
    panel.grid(axis="y", color=_GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(colors=_SOFT, labelsize=8, length=0)
    panel.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    panel.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(_SOFT)


def _moving_average(values: Sequence[float]) -> list[float]:
    """Mean of the points around each point; fewer at both ends."""
    half = _WINDOW // 2
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in around]


def main(arguments: Sequence[str]) -> None:
    """Thin the logs of the named training, if any, and draw the thinned logs."""
    if arguments:
        for log in Path(arguments[0]).glob("*/losses.jsonl"):
            write_log(thinned(log), LOGS / f"{log.parent.name}.jsonl")
    order = ("vae", "mllm", "base", "controlnet", "judge", "decoder")
    logs = {path.stem: path for path in sorted(LOGS.glob("*.jsonl"))}
    names = [*(n for n in order if n in logs), *(n for n in logs if n not in order)]
    draw_curves({name: read_log(logs[name]) for name in names}).savefig(PICTURE, dpi=130)
    print(PICTURE)


if __name__ == "__main__":
    main(sys.argv[1:])
