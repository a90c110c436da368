"""Pictures of base models from prompts alone, to choose between checkpoints by eye and by number.

    python -m workshop.demo.evaluation.base_samples SHEET.png BASE ... [--cfg 5] [--pictures 32]

Each BASE is a model set, or a checkpoint of the base model's training, such as
runs/demo/base/checkpoint-18000. All get the same prompts, which name everything, and the same
noise. The characters are drawn anew from the training split, on which settings may be chosen. The
sheet has a row for each base model, below the drawn pictures and their reconstructions by the
shipped autoencoder; the figures are shares of named attributes that the judge finds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from easyref_core.cli import require_extra
from easyref_core.demo_set import SET_FILE, shipped_set
from easyref_core.errors import EasyRefError
from easyref_core.files import check_output, write_atomically
from easyref_core.pictures.preprocessing import picture_levels
from easyref_core.weight_file import open_weight_file

from ..dataset.characters import ATTRIBUTES
from ..dataset.files import DatasetOptions, draw_group
from ..dataset.groups import Drawn
from ..models import DemoModels
from ..pretraining.base import BaseModel
from ..rows import SamplingSettings
from .classifier import SHIPPED_CLASSIFIER, Classifier, load_classifier

CHECKPOINT_FILE = "weights_ema.safetensors"
_SHOWN = 8  # pictures of a row
_TILE, _LABEL = 160, 190  # pixels
_SEED = 5  # other pictures than a training set of the default seed has


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m workshop.demo.evaluation.base_samples",
        description="Compare base models by pictures that prompts alone give.",
    )
    parser.add_argument("sheet", type=Path, metavar="SHEET", help="PNG file to write")
    parser.add_argument("base", type=Path, nargs="+", metavar="BASE", help="set or checkpoint")
    parser.add_argument("--cfg", type=float, default=SamplingSettings().cfg)
    parser.add_argument("--steps", type=int, default=SamplingSettings().steps)
    parser.add_argument("--pictures", type=int, default=32, help="for each; default: %(default)s")
    options = parser.parse_args(arguments)
    settings = replace(SamplingSettings(), cfg=options.cfg, steps=options.steps)
    try:
        require_extra("The demo", "demo", "diffusers")
        check_output(options.sheet, "a picture", lambda path: path.suffix == ".png", (), True)
        compare_bases(options.sheet, options.base, settings, options.pictures)
    except EasyRefError as error:
        print(f"base samples: {error}", file=sys.stderr)
        return 1
    return 0


def compare_bases(
    sheet: Path, bases: Sequence[Path], settings: SamplingSettings, count: int
) -> None:
    """Sample, print a line for each base model, and write the sheet.

    Raises:
        EasyRefError: a base model that is missing or damaged.
    """
    judge = load_classifier(SHIPPED_CLASSIFIER)
    drawn = draw_characters(count)
    pixels = torch.stack([picture_levels(image.picture) for image in drawn])
    rows = {"drawn": pixels, "reconstructed": DemoModels(shipped_set()).reconstruct(pixels)}
    for name, images in rows.items():
        print(_line(name, judge, images, drawn), flush=True)
    prompts, seeds = [image.full_caption for image in drawn], range(count)
    for number, base in enumerate(bases, 1):
        images = open_base(base).sample(prompts, seeds, settings)
        print(_line(str(base), judge, images, drawn), flush=True)
        rows[f"{number}: {base.name}"] = images
    picture = contact_sheet(rows)
    write_atomically(sheet, lambda partial: picture.save(partial, "PNG"))


def draw_characters(count: int) -> list[Drawn]:
    """New pictures of training characters, each alone; the same ones every time."""
    options = DatasetOptions(pictures=2, seed=_SEED)
    numbers = [number for number in range(5 * count) if number % 5 < 2][:count]
    return [draw_group(options, "training", number)[1][0] for number in numbers]


def open_base(base: Path) -> DemoModels:
    """A set, or the shipped set with the base model of a checkpoint.

    Raises:
        EasyRefError: neither a set nor a checkpoint, or a damaged one.
    """
    if (base / SET_FILE).is_file():
        return DemoModels(base)
    if not (base / CHECKPOINT_FILE).is_file():
        raise EasyRefError(
            f"{base} is neither a model set ({SET_FILE}) nor a checkpoint of the base model's "
            f"training ({CHECKPOINT_FILE})."
        )
    models = DemoModels(shipped_set())
    file = open_weight_file(base / CHECKPOINT_FILE)
    model = BaseModel()
    # Of the text encoders' last layers, which nothing reads, there are no trained weights.
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    if file.tensors.keys() != trained:
        raise EasyRefError(f"{base / CHECKPOINT_FILE} does not hold the demo's base model.")
    model.load_state_dict(file.read({name: name for name in trained}), strict=False)
    models.use_base(model.unet.state_dict(), model.text.weights())
    return models


def contact_sheet(rows: dict[str, torch.Tensor]) -> Image.Image:
    """The first images of each row, [N, 3, S, S] uint8, beside its name."""
    wide = _LABEL + _SHOWN * _TILE
    sheet = Image.new("RGB", (wide, _TILE * len(rows)), (250, 248, 244))
    draw = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows.items()):
        draw.text((8, row * _TILE + _TILE // 2), name, (44, 42, 48))
        for column, image in enumerate(images[:_SHOWN]):
            tile = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy(), "RGB")
            tile = tile.resize((_TILE - 4,) * 2, Image.Resampling.LANCZOS)
            sheet.paste(tile, (_LABEL + column * _TILE, row * _TILE + 2))
    return sheet


def _line(name: str, judge: Classifier, images: torch.Tensor, drawn: Sequence[Drawn]) -> str:
    scores = judge.scores(images, [image.facts for image in drawn])
    shares = {key: 100 * sum(values) / len(values) for key, values in scores.items()}
    mean = sum(shares[key] for key in ATTRIBUTES) / len(ATTRIBUTES)
    parts = ", ".join(f"{key} {share:.0f}" for key, share in shares.items())
    return f"{name}: identity {mean:.1f}% ({parts})"


if __name__ == "__main__":
    sys.exit(main())
