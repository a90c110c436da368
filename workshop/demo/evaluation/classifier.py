"""The judge: a small CNN that reads what a picture shows, one answer an attribute.

It is trained on drawn pictures alone, made worse in passing, so that it also reads generated ones,
which are softer and less exact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from easyref_core.errors import EasyRefError
from easyref_core.files import write_atomically
from easyref_core.weight_file import look

from ..dataset.characters import ACCESSORIES, COLOURS, EYES, PATTERNS, SHAPES
from ..dataset.groups import EVEN_PATTERNS, STYLE_PATTERNS
from ..dataset.scenes import PLACES, TIMES
from ..pretraining.pictures import SIDE, DrawnPictures
from ..pretraining.steps import Schedule, run_steps

JUDGE_FILE = "judge.safetensors"
# Attributes of style pictures have heads of their own: what is asked depends on the kind.
STYLE = "style "
VALUES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "pattern": PATTERNS,
    "eyes": EYES,
    "accessory": ACCESSORIES,
    "place": PLACES,
    "time": TIMES,
    STYLE + "shape": SHAPES,
    STYLE + "pattern": STYLE_PATTERNS,
    STYLE + "first": COLOURS,
    STYLE + "second": COLOURS,
    STYLE + "ground": COLOURS,
}
# Not a head: the two colours of a figure; where the pattern looks alike with both exchanged,
# whichever is called the first.
PALETTE = STYLE + "palette"
_PAIR = (STYLE + "first", STYLE + "second")
_FORMAT = "easyref.demo_judge"
_UNKNOWN = -100
_SHIFT = 6  # pixels
_AT_ONCE = 64


class Judge(nn.Module):
    """Reads pictures; see `VALUES` for its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _block(3, 24, 2),
            _block(24, 48, 2),
            _block(48, 96, 2),
            _block(96, 96, 1),
            _block(96, 128, 2),
            _block(128, 128, 1),
        )
        # Mean and maximum over all places: where the figure stands does not matter.
        self.answers = nn.Linear(2 * 128, sum(map(len, VALUES.values())))

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """[B, 3, 128, 128] in -1..1 -> head -> logits [B, values]."""
        x = self.layers(pixels)
        x = self.answers(torch.cat((x.mean((2, 3)), x.amax((2, 3))), dim=1))
        return dict(zip(VALUES, x.split([len(v) for v in VALUES.values()], dim=1), strict=True))

    @torch.no_grad()
    def probabilities(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 [B, 3, H, W] of any size -> head -> [B, values], on the CPU."""
        device = self.answers.weight.device
        found: dict[str, list[torch.Tensor]] = {head: [] for head in VALUES}
        for part in pixels.split(_AT_ONCE):
            levels = part.to(device).float() / 127.5 - 1
            if levels.shape[2:] != (SIDE, SIDE):
                levels = F.interpolate(
                    levels, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True
                )
            for head, logits in self(levels).items():
                found[head].append(logits.float().softmax(-1).cpu())
        return {head: torch.cat(parts) for head, parts in found.items()}

    def right(
        self, pixels: torch.Tensor, facts: Sequence[Mapping[str, str]]
    ) -> dict[str, list[float]]:
        """Attribute -> 1 or 0 for each of the pictures that have it, in their order.

        Style pictures have a `PALETTE` too: the share of their figure's two colours that is right.
        """
        found: dict[str, list[float]] = {}
        sure = self.probabilities(pixels)
        best = {head: p.argmax(-1).tolist() for head, p in sure.items()}
        for row, of_picture in enumerate(facts):
            asked = wanted(of_picture)
            for head, value in asked.items():
                found.setdefault(head, []).append(float(VALUES[head][best[head][row]] == value))
            if asked.keys() >= {*_PAIR, STYLE + "pattern"}:
                pair = _pair({head: sure[head][row] for head in _PAIR}, asked)
                hits = sum(VALUES[head][number] == asked[head] for head, number in pair.items())
                found.setdefault(PALETTE, []).append(hits / len(pair))
        return found


@dataclass(frozen=True)
class Reading:
    """One attribute of one picture."""

    attribute: str
    wanted: str
    seen: str

    @property
    def right(self) -> bool:
        return self.seen == self.wanted


def read_pictures(
    judge: Judge, pictures: Sequence[Image.Image], facts: Mapping[str, str]
) -> list[list[Reading]]:
    """What the judge sees in pictures that should all show `facts`, one row a picture.

    Args:
        facts: attribute -> value, as in a drawn data set's `facts.json`; those with a "ground" are
            a style's; see `PALETTE` for its two colours. What is not named is not asked.
    """
    rows: list[list[Reading]] = []
    for picture in pictures:
        levels = np.asarray(picture.convert("RGB"))
        pixels = torch.from_numpy(levels.copy()).permute(2, 0, 1)[None]
        sure = {head: of_picture[0] for head, of_picture in judge.probabilities(pixels).items()}
        asked = wanted(facts)
        best = {head: int(sure[head].argmax()) for head in asked}
        if asked.keys() >= {*_PAIR, STYLE + "pattern"}:
            best |= _pair(sure, asked)
        rows.append(
            [
                Reading(head.removeprefix(STYLE), value, VALUES[head][at])
                for (head, value), at in zip(asked.items(), best.values(), strict=True)
            ]
        )
    return rows


def _pair(sure: Mapping[str, torch.Tensor], asked: Mapping[str, str]) -> dict[str, int]:
    """Head -> number of the colour seen, for both of `_PAIR`; where the asked pattern looks alike
    either way, what is called the first is decided by what is asked.

    Args:
        sure: head -> [values] of one picture.
    """
    if asked[STYLE + "pattern"] not in EVEN_PATTERNS:
        return {head: int(sure[head].argmax()) for head in _PAIR}
    one, other = sum(sure[head] for head in _PAIR).topk(2).indices.tolist()
    first, second = _PAIR
    if asked[first] == COLOURS[other] or asked[second] == COLOURS[one]:
        one, other = other, one
    return {first: one, second: other}


def wanted(facts: Mapping[str, str]) -> dict[str, str]:
    """Head -> value of a picture's facts."""
    prefix = STYLE if "ground" in facts else ""
    return {prefix + name: value for name, value in facts.items() if prefix + name in VALUES}


def train_judge(
    pictures: DrawnPictures, schedule: Schedule, folder: Path, device: torch.device
) -> Path:
    """Train a judge and write it to `folder`/judge.safetensors, which is returned."""
    torch.manual_seed(schedule.seed)
    judge = Judge().to(device)
    labels = _labels(pictures.facts)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        numbers = torch.randint(len(pictures), (schedule.batch,), generator=generator)
        seen = judge(worsen(pictures.batch(numbers), generator).to(device))
        chosen = labels[numbers].to(device)
        losses = [
            F.cross_entropy(seen[head].float(), chosen[:, place], reduction="none")
            for place, head in enumerate(VALUES)
        ]
        # Unknown attributes count as 0; each picture has five or seven known ones.
        return torch.stack(losses, dim=1).sum(1).mean()

    run_steps(judge, loss, schedule, folder, device)
    path = folder / JUDGE_FILE
    save_judge(judge, path)
    return path


def worsen(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift, blur, tint and grain pictures [B, 3, S, S] in -1..1, each by another amount."""
    count, _, side, _ = pixels.shape
    padded = F.pad(pixels, (_SHIFT,) * 4, mode="replicate")
    corners = torch.randint(2 * _SHIFT + 1, (count, 2), generator=generator).tolist()
    moved = torch.stack(
        [p[:, y : y + side, x : x + side] for p, (y, x) in zip(padded, corners, strict=True)]
    )

    def amounts(most: float, channels: int = 1) -> torch.Tensor:
        return most * torch.rand(count, channels, 1, 1, generator=generator)

    soft = F.avg_pool2d(F.avg_pool2d(moved, 3, 1, 1), 3, 1, 1)
    blurred = moved + amounts(1.0) * (soft - moved)
    tinted = blurred * (0.8 + amounts(0.4)) + amounts(0.2, 3) - 0.1
    grain = torch.randn(pixels.shape, generator=generator)
    return tinted + amounts(0.12) * grain


def save_judge(judge: Judge, path: Path) -> None:
    """Write a judge as float16 safetensors; the metadata says which answers its heads give."""
    from safetensors.torch import save_file

    weights = {n: w.detach().cpu().half().contiguous() for n, w in judge.state_dict().items()}
    metadata = {"format": _FORMAT, "values": json.dumps(VALUES)}
    write_atomically(path, lambda partial: save_file(weights, partial, metadata))


def load_judge(path: Path, device: torch.device | str = "cpu") -> Judge:
    """Read a judge back.

    Raises:
        EasyRefError: no such file, not a judge, or one for other attributes.
    """
    file = look(path)
    if file.metadata.get("format") != _FORMAT:
        raise EasyRefError(f"{path} does not hold a demo judge. Name a {JUDGE_FILE}.")
    if file.metadata.get("values") != json.dumps(VALUES):
        raise EasyRefError(
            f"{path} was trained on other attributes or values than the pictures drawn here have. "
            "Train the judge again."
        )
    judge = Judge()
    weights = file.read({name: name for name in judge.state_dict() if name in file.tensors})
    try:
        judge.load_state_dict(weights)
    except RuntimeError as error:
        raise EasyRefError(f"{path} does not fit the judge: {error} Train it again.") from error
    return judge.to(device).eval()


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.GroupNorm(8, outputs),
        nn.ReLU(inplace=True),
    )


def _labels(facts: Sequence[Mapping[str, str]]) -> torch.Tensor:
    """[N, heads] numbers of values."""
    rows = []
    for of_picture in facts:
        values = wanted(of_picture)
        rows.append([VALUES[h].index(values[h]) if h in values else _UNKNOWN for h in VALUES])
    return torch.tensor(rows)
