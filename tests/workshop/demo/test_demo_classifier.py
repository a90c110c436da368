"""The classifier learns attributes of drawn images, and its file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("diffusers")

from easyref_core.errors import EasyRefError
from easyref_core.pictures.preprocessing import picture_levels
from workshop.demo.dataset.characters import ATTRIBUTES, COLOURS, Identity
from workshop.demo.dataset.groups import Drawn, Style, draw_identity, draw_style
from workshop.demo.evaluation.classifier import (
    PALETTE,
    VALUES,
    Classifier,
    classify,
    expected_values,
    load_classifier,
    save_classifier,
    train_classifier,
    worsen,
)
from workshop.demo.pretraining.pictures import DrawnPictures
from workshop.demo.pretraining.steps import Schedule

CPU = torch.device("cpu")
STRIPED = Style("stripes", "blue", "pink", "yellow")


def in_memory(drawn: Sequence[Drawn]) -> DrawnPictures:
    pixels = torch.stack([picture_levels(image.picture) for image in drawn])
    names = [str(number) for number in range(len(drawn))]
    return DrawnPictures(
        names, pixels, [[image.caption] for image in drawn], [d.facts for d in drawn]
    )


def red_and_blue(count: int, seed: int) -> DrawnPictures:
    rng = random.Random(seed)
    identities = [Identity("round", c, "plain", "beady", "bow") for c in ("red", "blue")]
    return in_memory([draw_identity(identities[n % 2], 128, rng) for n in range(count)])


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier().eval()


def test_it_learns_two_colours(tmp_path: Path) -> None:
    schedule = Schedule(25, 16, 3e-3, warmup=3, ema=0.8)
    trained = load_classifier(train_classifier(red_and_blue(24, 0), schedule, tmp_path, CPU))
    unseen = red_and_blue(20, 1)
    scores = trained.scores(unseen.pixels, unseen.facts)
    assert sum(scores["colour"]) >= 18
    swapped = [facts | {"colour": "green"} for facts in unseen.facts]
    assert sum(trained.scores(unseen.pixels, swapped)["colour"]) <= 2


def test_its_file_gives_the_same_probabilities(tmp_path: Path, classifier: Classifier) -> None:
    pixels = red_and_blue(4, 2).pixels
    path = tmp_path / "judge.safetensors"
    save_classifier(classifier, path)
    assert path.stat().st_size < 1e6
    before, after = classifier.probabilities(pixels), load_classifier(path).probabilities(pixels)
    assert before.keys() == after.keys()
    for head, values in before.items():
        assert values.shape == (4, len(VALUES[head]))
        assert (values - after[head]).abs().max() < 5e-3


def test_a_file_of_something_else_is_refused(tmp_path: Path, classifier: Classifier) -> None:
    path = tmp_path / "judge.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(EasyRefError, match="does not hold a demo judge"):
        load_classifier(path)
    with pytest.raises(EasyRefError, match="no weight file"):
        load_classifier(tmp_path / "absent.safetensors")


def test_a_classifier_of_other_values_is_refused(
    tmp_path: Path, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "judge.safetensors"
    save_classifier(classifier, path)
    monkeypatch.setitem(VALUES, "time", ("day", "night", "sunset"))
    with pytest.raises(EasyRefError, match="other attributes or values"):
        load_classifier(path)


def test_each_kind_of_image_has_its_own_heads(classifier: Classifier) -> None:
    rng = random.Random(0)
    character = draw_identity(Identity("star", "red", "dots", "goggle", "crown"), 128, rng)
    style = draw_style(STRIPED, "star", 128, rng)
    assert set(expected_values(character.facts)) == {*ATTRIBUTES, "place", "time"}
    names = ("shape", "pattern", "first", "second", "ground")
    assert expected_values(style.facts) == {f"style {name}": style.facts[name] for name in names}
    mixed = in_memory([character, style, character])
    counts = {
        head: len(flags) for head, flags in classifier.scores(mixed.pixels, mixed.facts).items()
    }
    assert counts == {head: 1 if head.startswith("style ") else 2 for head in (*VALUES, PALETTE)}


def test_two_colours_may_be_exchanged_where_both_orders_look_alike(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {head: torch.zeros(1, len(values)) for head, values in VALUES.items()}
    # Undecided between two colours for both, as in checks: each alone could be predicted twice.
    for head, sure in (("style first", (0.6, 0.4)), ("style second", (0.55, 0.45))):
        rows[head][0, [COLOURS.index("red"), COLOURS.index("blue")]] = torch.tensor(sure)
    monkeypatch.setattr(classifier, "probabilities", lambda pixels: rows)
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)

    def predict(first: str, second: str, pattern: str) -> tuple[float, list[str]]:
        facts = {"first": first, "second": second, "ground": "red", "pattern": pattern}
        predictions = classify(classifier, [Image.new("RGB", (8, 8))], facts)[0]
        return classifier.scores(pixels, [facts])[PALETTE][0], [
            p.predicted for p in predictions[:2]
        ]

    for pattern in ("checks", "stripes"):
        assert predict("red", "blue", pattern) == (1, ["red", "blue"])
        assert predict("blue", "red", pattern) == (1, ["blue", "red"])
        assert predict("pink", "red", pattern) == (0.5, ["blue", "red"])
        assert predict("blue", "pink", pattern) == (0.5, ["blue", "red"])
        assert predict("pink", "teal", pattern)[0] == 0
    for pattern in ("dots", "rings"):
        assert predict("red", "blue", pattern) == (0.5, ["red", "red"])
        assert predict("blue", "red", pattern) == (0.5, ["red", "red"])
        assert predict("blue", "pink", pattern)[0] == 0
    assert classifier.scores(pixels, [{"ground": "red"}]).keys() == {"style ground"}


def test_images_of_any_size_are_classified(classifier: Classifier) -> None:
    rng = random.Random(0)
    style = draw_style(STRIPED, "star", 128, rng)
    pictures = [style.picture, style.picture.resize((200, 200)), style.picture.resize((64, 64))]
    rows = classify(classifier, pictures, style.facts)
    assert [[p.attribute for p in row] for row in rows] == [list(style.facts)] * 3
    for prediction in (prediction for row in rows for prediction in row):
        assert prediction.expected == style.facts[prediction.attribute]
        assert prediction.correct == (prediction.predicted == prediction.expected)
    only = classify(classifier, pictures[:1], {"colour": "red"})
    assert [prediction.attribute for prediction in only[0]] == ["colour"]


def test_images_are_worsened_differently_and_by_the_generators_seed() -> None:
    pixels = red_and_blue(1, 3).batch(torch.tensor([0, 0, 0]))

    def worsened(seed: int) -> torch.Tensor:
        return worsen(pixels, torch.Generator().manual_seed(seed))

    first = worsened(0)
    assert torch.equal(first, worsened(0))
    assert not torch.equal(first, worsened(1))
    assert not torch.equal(first[0], first[1])
    assert first.shape == pixels.shape
    assert (first - pixels).abs().mean() < 0.5
