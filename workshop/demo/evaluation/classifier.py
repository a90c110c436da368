"""The judge: a small CNN that classifies an image's attributes, with a head per attribute.

It is trained on drawn images only, with augmentations that make them worse, because generated ones
are softer and less exact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from easyref_core.errors import EasyRefError
from easyref_core.files import write_atomically
from easyref_core.pictures.preprocessing import picture_levels
from easyref_core.weight_file import open_weight_file

from ..dataset.characters import ACCESSORIES, COLOURS, EYES, PATTERNS, SHAPES
from ..dataset.groups import EVEN_PATTERNS, STYLE_PATTERNS
from ..dataset.scenes import PLACES, TIMES
from ..pretraining.pictures import SIDE, DrawnPictures
from ..pretraining.steps import Schedule, run_steps

CLASSIFIER_FILE = "judge.safetensors"
SHIPPED_CLASSIFIER = Path(__file__).resolve().parents[1] / "weights" / CLASSIFIER_FILE
# Attributes of style images have heads of their own.
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
# Not a head: the two colours of a figure, in any order where the pattern looks alike with both
# exchanged.
PALETTE = STYLE + "palette"
_PAIR = (STYLE + "first", STYLE + "second")
_FORMAT = "easyref.demo_judge"
_IGNORED = -100  # label that cross_entropy ignores
_SHIFT = 6  # pixels
_BATCH = 64


class Classifier(nn.Module):
    """CNN with the heads of `VALUES`."""

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
        # Mean and maximum over all places, wherever the figure is.
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
        batches: dict[str, list[torch.Tensor]] = {head: [] for head in VALUES}
        for part in pixels.split(_BATCH):
            levels = part.to(device).float() / 127.5 - 1
            if levels.shape[2:] != (SIDE, SIDE):
                levels = F.interpolate(
                    levels, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True
                )
            for head, logits in self(levels).items():
                batches[head].append(logits.float().softmax(-1).cpu())
        return {head: torch.cat(parts) for head, parts in batches.items()}

    def scores(
        self, pixels: torch.Tensor, facts: Sequence[Mapping[str, str]]
    ) -> dict[str, list[float]]:
        """Attribute -> 1 (correct) or 0 for each of the images that have it, in order.

        Style images have a `PALETTE` too: the share of their figure's two colours that is correct.
        """
        scores: dict[str, list[float]] = {}
        probabilities = self.probabilities(pixels)
        best = {head: p.argmax(-1).tolist() for head, p in probabilities.items()}
        for row, of_image in enumerate(facts):
            expected = expected_values(of_image)
            for head, value in expected.items():
                scores.setdefault(head, []).append(float(VALUES[head][best[head][row]] == value))
            if expected.keys() >= {*_PAIR, STYLE + "pattern"}:
                pair = _pair({head: probabilities[head][row] for head in _PAIR}, expected)
                hits = sum(VALUES[head][index] == expected[head] for head, index in pair.items())
                scores.setdefault(PALETTE, []).append(hits / len(pair))
        return scores


@dataclass(frozen=True)
class Prediction:
    """One attribute of one image."""

    attribute: str
    expected: str
    predicted: str

    @property
    def correct(self) -> bool:
        return self.predicted == self.expected


def classify(
    classifier: Classifier, images: Sequence[Image.Image], facts: Mapping[str, str]
) -> list[list[Prediction]]:
    """Predictions for images that should all show `facts`, one list per image.

    Args:
        facts: attribute -> value, as in a drawn data set's `facts.json`; those with a "ground" are
            a style's; see `PALETTE` for its two colours. Other attributes are left out.
    """
    rows: list[list[Prediction]] = []
    for image in images:
        pixels = picture_levels(image.convert("RGB"))[None]
        probabilities = {head: p[0] for head, p in classifier.probabilities(pixels).items()}
        expected = expected_values(facts)
        best = {head: int(probabilities[head].argmax()) for head in expected}
        if expected.keys() >= {*_PAIR, STYLE + "pattern"}:
            best |= _pair(probabilities, expected)
        rows.append(
            [
                Prediction(head.removeprefix(STYLE), value, VALUES[head][index])
                for (head, value), index in zip(expected.items(), best.values(), strict=True)
            ]
        )
    return rows


def _pair(probabilities: Mapping[str, torch.Tensor], expected: Mapping[str, str]) -> dict[str, int]:
    """Head -> index of the predicted colour, for both of `_PAIR`; where the expected pattern looks
    alike with both exchanged, they are ordered as expected.

    Args:
        probabilities: head -> [values] of one image.
    """
    if expected[STYLE + "pattern"] not in EVEN_PATTERNS:
        return {head: int(probabilities[head].argmax()) for head in _PAIR}
    one, other = sum(probabilities[head] for head in _PAIR).topk(2).indices.tolist()
    first, second = _PAIR
    if expected[first] == COLOURS[other] or expected[second] == COLOURS[one]:
        one, other = other, one
    return {first: one, second: other}


def expected_values(facts: Mapping[str, str]) -> dict[str, str]:
    """Head -> value of an image's facts."""
    prefix = STYLE if "ground" in facts else ""
    return {prefix + name: value for name, value in facts.items() if prefix + name in VALUES}


def train_classifier(
    pictures: DrawnPictures, schedule: Schedule, folder: Path, device: torch.device
) -> Path:
    """Train a classifier and write it to `folder`/judge.safetensors; returns that path."""
    torch.manual_seed(schedule.seed)
    classifier = Classifier().to(device)
    labels = _labels(pictures.facts)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        numbers = torch.randint(len(pictures), (schedule.batch,), generator=generator)
        logits = classifier(worsen(pictures.batch(numbers), generator).to(device))
        chosen = labels[numbers].to(device)
        losses = [
            F.cross_entropy(logits[head].float(), chosen[:, column], reduction="none")
            for column, head in enumerate(VALUES)
        ]
        # Ignored attributes have loss 0; each image has five or seven others.
        return torch.stack(losses, dim=1).sum(1).mean()

    run_steps(classifier, loss, schedule, folder, device)
    path = folder / CLASSIFIER_FILE
    save_classifier(classifier, path)
    return path


def worsen(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift, blur, tint and add grain to images [B, 3, S, S] in -1..1, by random amounts."""
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


def save_classifier(classifier: Classifier, path: Path) -> None:
    """Write a classifier as float16 safetensors; the metadata lists its heads' values."""
    from safetensors.torch import save_file

    weights = {n: w.detach().cpu().half().contiguous() for n, w in classifier.state_dict().items()}
    metadata = {"format": _FORMAT, "values": json.dumps(VALUES)}
    write_atomically(path, lambda partial: save_file(weights, partial, metadata))


def load_classifier(path: Path, device: torch.device | str = "cpu") -> Classifier:
    """Load a classifier for inference.

    Raises:
        EasyRefError: no such file, not a classifier, or one for other attributes.
    """
    file = open_weight_file(path)
    if file.metadata.get("format") != _FORMAT:
        raise EasyRefError(f"{path} does not hold a demo judge. Name a {CLASSIFIER_FILE}.")
    if file.metadata.get("values") != json.dumps(VALUES):
        raise EasyRefError(
            f"{path} was trained on other attributes or values than the images drawn here have. "
            "Train the judge again."
        )
    classifier = Classifier()
    weights = file.read({name: name for name in classifier.state_dict() if name in file.tensors})
    try:
        classifier.load_state_dict(weights)
    except RuntimeError as error:
        raise EasyRefError(f"{path} does not fit the judge: {error} Train it again.") from error
    return classifier.to(device).eval()


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.GroupNorm(8, outputs),
        nn.ReLU(inplace=True),
    )


def _labels(facts: Sequence[Mapping[str, str]]) -> torch.Tensor:
    """[N, heads] indices of values."""
    rows = []
    for of_image in facts:
        values = expected_values(of_image)
        rows.append([VALUES[h].index(values[h]) if h in values else _IGNORED for h in VALUES])
    return torch.tensor(rows)
