"""The rows of the table: the metrics of all scores, with their bars."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial

from easyref_core.evaluation.statistics import difference, estimate

from ..dataset.characters import ATTRIBUTES
from .classifier import PALETTE, STYLE, VALUES
from .metrics import (
    Row,
    Scores,
    at_chance,
    at_least,
    chance_of,
    mean_of,
    missing,
    no_better_than_chance,
    not_below,
    reported,
    rises,
    within,
)

IDENTITIES = 150
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
SCENE = ("place", "time")
PATTERN, FIRST, SECOND, GROUND = (STYLE + name for name in ("pattern", "first", "second", "ground"))
# The palette counts as the two colours that it is.
LOOK = (PATTERN, PALETTE, PALETTE, GROUND)
SHAPE = STYLE + "shape"
OUTLINE = "outline"
# Names for `--compare`; the last one encodes each image alone, as it was trained to.
AVERAGING = "averaging"
COMPARED = {
    "stage1": "stage 1",
    "stage2": "stage 2",
    "scratch": "stage 3 from nothing, same steps in all",
    AVERAGING: "network trained for averaging, same steps",
}
_SINGLE_BARS = {"colour": 0.95, "accessory": 0.95, "shape": 0.75}
# Words are exact, and the base model is trained on them: every attribute that has a bar with
# references has at least that bar with words, and the average a higher one.
_NAMED_BAR = 0.9

Results = Mapping[str, Scores]
"""Condition -> scores, see `conditions`."""


def all_rows(results: Results, looks: Sequence[Hashable]) -> list[Row]:
    """Every row of the table, in order.

    Args:
        looks: of each style group; some come several times.
    """
    return [
        *_identity(results),
        *_scene(results),
        *_prompt_only(results, looks),
        *_crowd(results),
        *_control_by_references(results),
        *_style(results, looks),
        *_control(results),
        *_compared(results),
    ]


def classifier_rows(drawn: Scores, rebuilt: Scores) -> list[Row]:
    """The classifier's accuracy on drawn images, and on their reconstructions."""
    return [
        reported(
            f"judge: {head}",
            estimate(scores),
            note=f"after the autoencoder {100 * estimate(rebuilt[head]).value:.1f}%",
        )
        for head, scores in drawn.items()
    ]


def _identity(results: Results) -> list[Row]:
    easyref, plain = results["easyref"], results["plain"]
    count = len(easyref["shape"])
    bar = f">= {IDENTITIES}"
    enough = Row("identities judged", None, bar, count >= IDENTITIES, note=f"{count} of them")
    rows = [enough, at_least("identity, 4 references", estimate(_mean(easyref)), 0.85)]
    for name in ATTRIBUTES:
        accuracy = estimate(easyref[name])
        title = f"  identity: {name}"
        bar = _SINGLE_BARS.get(name)
        rows.append(reported(title, accuracy) if bar is None else at_least(title, accuracy, bar))
    chance = chance_of(VALUES, ATTRIBUTES)
    rows.append(at_chance("identity, no references", estimate(_mean(plain)), chance))
    for name in ATTRIBUTES:
        note = f"chance {100 * chance_of(VALUES, [name]):.1f}%"
        rows.append(reported(f"  no references: {name}", estimate(plain[name]), note=note))
    return rows


def _scene(results: Results) -> list[Row]:
    easyref, plain = (mean_of(results[name], SCENE) for name in ("easyref", "plain"))
    return [
        at_least("place and time, 4 references", estimate(easyref), 0.97),
        reported("place and time, no references", estimate(plain)),
        within("  place and time: with less without", difference(easyref, plain), 0.03),
    ]


def _prompt_only(results: Results, looks: Sequence[Hashable]) -> list[Row]:
    """The base model alone, with prompts that name everything."""
    named, style = results["named"], results["named style"]
    rows = [at_least("prompt only: all that it names", estimate(_mean(named)), _NAMED_BAR)]
    for name in ATTRIBUTES:
        accuracy, title = estimate(named[name]), f"  prompt only: {name}"
        bar = _SINGLE_BARS.get(name)
        rows.append(reported(title, accuracy) if bar is None else at_least(title, accuracy, bar))
    scene = estimate(mean_of(named, SCENE))
    look = estimate(mean_of(style, LOOK), looks)
    return [
        *rows,
        reported("  prompt only: all attributes right", estimate(_all_right(named, ATTRIBUTES))),
        at_least("prompt only: place and time", scene, 0.97),
        at_least("prompt only, style: pattern and palette", look, 0.8),
        at_least("prompt only, style: shape", estimate(style[SHAPE], looks), 0.8),
    ]


def _crowd(results: Results) -> list[Row]:
    four, one, average = (
        _mean(results[name]) for name in ("crowded 4", "crowded 1", "crowded average")
    )
    return [
        reported("crowded, 4 references", estimate(four)),
        reported("crowded, 1 reference", estimate(one)),
        at_least("  crowded: 4 less 1", difference(four, one), 0.25, points=True),
        reported("crowded, 4 averaged", estimate(average)),
        at_least("  crowded: joint less averaged", difference(four, average), 0.15, points=True),
    ]


def _control_by_references(results: Results) -> list[Row]:
    wrong = results["wrong"]
    own = no_better_than_chance(
        "wrong references: own identity",
        estimate(_mean(results["wrong own"])),
        chance_of(VALUES, ATTRIBUTES),
    )
    steps = [_mean(results[f"weight {weight:g}"]) for weight in WEIGHTS]
    names = ", ".join(f"{weight:g}" for weight in WEIGHTS)
    return [
        at_least("wrong references: their identity", estimate(_mean(wrong)), 0.85),
        own,
        rises(f"identity at weight {names}", steps),
    ]


def _style(results: Results, looks: Sequence[Hashable]) -> list[Row]:
    scores = results["style"]
    estimate_looks = partial(estimate, looks=looks)
    ordered = mean_of(scores, (PATTERN, FIRST, SECOND, GROUND))
    different = f"{len(looks)} groups, {len(set(looks))} different looks"
    return [
        Row("styles judged", None, note=different),
        at_least("style: pattern and palette", estimate_looks(mean_of(scores, LOOK)), 0.8),
        reported("  style: pattern", estimate_looks(scores[PATTERN])),
        reported("  style: two colours", estimate_looks(scores[PALETTE])),
        reported("  style: ground", estimate_looks(scores[GROUND])),
        reported("  style: all four right", estimate_looks(_all_right(scores, LOOK))),
        reported("  style: first colour", estimate_looks(scores[FIRST])),
        reported("  style: second colour", estimate_looks(scores[SECOND])),
        reported("  style: pattern and palette, always in order", estimate_looks(ordered)),
        at_least("style: shape that the prompt names", estimate_looks(scores[SHAPE]), 0.8),
    ]


def _control(results: Results) -> list[Row]:
    overlap, identity = "outline with EasyRef less without", "identity with ControlNet less without"
    if "control easyref" not in results:
        why = "the set has no ControlNet"
        return [missing(overlap, why, ">= -5 points"), missing(identity, why, ">= -5 points")]
    both, alone = results["control easyref"], results["control plain"]
    easyref = results["easyref"]
    return [
        reported("outline, ControlNet alone", estimate(alone[OUTLINE]), note="IoU"),
        reported("outline, EasyRef and ControlNet", estimate(both[OUTLINE]), note="IoU"),
        reported("outline, EasyRef alone", estimate(easyref[OUTLINE]), note="IoU"),
        reported("outline, neither", estimate(results["plain"][OUTLINE]), note="IoU"),
        not_below(f"  {overlap}", difference(both[OUTLINE], alone[OUTLINE]), 0.05),
        reported("identity, ControlNet alone", estimate(_mean(alone))),
        reported("identity, EasyRef and ControlNet", estimate(_mean(both))),
        not_below(f"  {identity}", difference(_mean(both), _mean(easyref)), 0.05),
    ]


def _compared(results: Results) -> list[Row]:
    """This adapter, the stages and the baselines."""
    rows = []
    named = {"": "this adapter"} | {f"{name} ": title for name, title in COMPARED.items()}
    for prefix, title in named.items():
        keys = (f"{prefix}easyref", f"{prefix}crowded 4")
        if keys[0] not in results:
            name = prefix.strip()
            rows.append(missing(title, f"not given; --compare {name}=FILE"))
            continue
        clear, crowded = (_mean(results[key]) for key in keys)
        rows.append(reported(f"{title}: identity", estimate(clear)))
        rows.append(reported(f"{title}: crowded", estimate(crowded)))
        if prefix.strip() == AVERAGING:
            lead = difference(_mean(results["crowded 4"]), crowded)
            rows.append(reported("  crowded: joint less trained averaging", lead, points=True))
    return rows


def _all_right(scores: Scores, attributes: Sequence[str]) -> list[float]:
    """For each group 1 if all attributes are correct, else 0."""
    columns = [scores[name] for name in attributes]
    return [float(min(row) == 1) for row in zip(*columns, strict=True)]


def _mean(scores: Scores) -> list[float]:
    """Each group's share of correct identity attributes."""
    return mean_of(scores, ATTRIBUTES)
