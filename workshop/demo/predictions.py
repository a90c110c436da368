"""Attributes that the classifier predicts for the demo's results, against the expected ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .evaluation.classifier import SHIPPED_CLASSIFIER, Prediction, classify, load_classifier
from .rows import DemoImages, DemoInputs

# Result, by the names of `RowImages.named` -> predictions, one per attribute.
RowPredictions = Mapping[str, Sequence[Prediction]]


def classify_results(inputs: DemoInputs, images: DemoImages) -> list[RowPredictions]:
    """Classify every result.

    Raises:
        EasyRefError: the classifier's file is missing or cannot be used.
    """
    classifier = load_classifier(SHIPPED_CLASSIFIER)
    predictions: list[RowPredictions] = []
    for row, results in zip(inputs.rows, images.rows, strict=True):
        named = results.named()
        per_image = classify(classifier, list(named.values()), row.facts)
        predictions.append(dict(zip(named, per_image, strict=True)))
    return predictions


def summary(predictions: Sequence[Prediction]) -> str:
    """One image's predictions in a few words."""
    wrong = [p.attribute for p in predictions if not p.correct]
    correct = f"{len(predictions) - len(wrong)} of {len(predictions)}"
    return f"{correct}, not {' and '.join(wrong)}" if 0 < len(wrong) <= 2 else correct


def attribute_table(inputs: DemoInputs, predictions: Sequence[RowPredictions]) -> str:
    """A line per row and attribute: the expected value, then each result's, "=" if correct."""
    results = list(predictions[0])
    lines = [("row", "attribute", "expected", *results)]
    for row, of_row in zip(inputs.rows, predictions, strict=True):
        for of_attribute in zip(*of_row.values(), strict=True):
            cells = ("=" if p.correct else p.predicted for p in of_attribute)
            lines.append((row.name, of_attribute[0].attribute, of_attribute[0].expected, *cells))
    totals = []
    for result in results:
        correct = [p.correct for of_row in predictions for p in of_row[result]]
        totals.append(f"{sum(correct)} of {len(correct)}")
    lines.append(("all", "correct", "", *totals))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
