"""What is generated for each measure, and what the judge reads in it.

All conditions use the same groups, prompts and noise, so they differ in the condition alone and can
be compared group by group. Pictures are made at the set's own settings, which must not be chosen on
held-out groups; the split "training" serves for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..models import DemoAdapter, DemoModels, Steering
from ..parts import Settings
from ..pretraining.pictures import read_pixels
from .groups import REFERENCES, DrawnSplit, Group, open_pictures, read_outlines, strangers
from .judge import Judge
from .outlines import overlap
from .rows import AVERAGING, OUTLINE, WEIGHTS

Report = Callable[[str], None]
Conditions = dict[str, dict[str, list[float]]]
"""Condition -> attribute -> a score for each group."""
_SEED = 1_000_000


@dataclass(frozen=True)
class CheckOptions:
    """
    Attributes:
        compare: name -> adapter file; see `rows.COMPARED`.
        mllm: Qwen2-VL directory for those of them that do not carry the MLLM; the set's by default.
    """

    settings: Settings
    compare: Mapping[str, Path] = field(default_factory=dict)
    mllm: Path | None = None


def judge_accuracy(judge: Judge, models: DemoModels, split: DrawnSplit) -> tuple[dict, dict]:
    """Attribute -> share of each group's pictures of one figure that is read right: on the drawn
    pictures, and on what the autoencoder leaves of them.
    """
    groups = [group.alone for group in split.groups]
    drawn = read_pixels([path for paths in groups for path in paths])
    found: list[dict[str, list[float]]] = []
    for pixels in (drawn, models.rebuild(drawn)):
        shares: dict[str, list[float]] = {}
        for paths, part in zip(groups, pixels.split([len(paths) for paths in groups]), strict=True):
            right = judge.right(part, [split.facts[path] for path in paths])
            for head, scores in right.items():
                shares.setdefault(head, []).append(sum(scores) / len(scores))
        found.append(shares)
    return found[0], found[1]


def tasks(options: CheckOptions) -> list[str]:
    """What can be measured apart from each other, the longest first."""
    return ["identity", "crowded", *options.compare, "wrong", "style"]


def run_check(
    models: DemoModels, judge: Judge, split: DrawnSplit, options: CheckOptions, report: Report
) -> Conditions:
    """Generate and judge everything.

    Args:
        report: told what is being made, as it takes minutes.

    Returns:
        Condition -> attribute -> a score for each group.

    Raises:
        EasyRefError: an adapter that cannot be loaded or does not fit.
    """
    results: Conditions = {}
    for task in tasks(options):
        results |= run_task(task, models, judge, split, options, report)
    return results


def run_task(
    task: str,
    models: DemoModels,
    judge: Judge,
    split: DrawnSplit,
    options: CheckOptions,
    report: Report,
) -> Conditions:
    """One of `tasks`, see `run_check`."""
    compared = options.compare.get(task)
    adapter = models.adapter(compared, options.mllm if compared else None)
    studio = _Studio(models, judge, options.settings, adapter, report)
    if compared:
        return _compared(studio, split, task)
    makers = {"identity": _identity, "crowded": _crowded, "wrong": _wrong, "style": _style}
    return makers[task](studio, split)


def _identity(studio: _Studio, split: DrawnSplit) -> Conditions:
    groups = split.of_kind("identity")
    results = {"plain": studio.make("no references", groups)}
    tokens = studio.read(groups)
    for weight in WEIGHTS:
        made = studio.make(f"weight {weight:g}", groups, tokens, weight)
        results[f"weight {weight:g}"] = made
    results["easyref"] = results[f"weight {WEIGHTS[-1]:g}"]
    if studio.models.has_controlnet:
        outlines = read_outlines(groups, studio.settings.side)
        results["control plain"] = studio.make("ControlNet", groups, outlines=outlines)
        results["control easyref"] = studio.make(
            "EasyRef and ControlNet", groups, tokens, outlines=outlines
        )
    return results


def _wrong(studio: _Studio, split: DrawnSplit) -> Conditions:
    groups = split.of_kind("identity")
    others = strangers(groups)
    pixels = studio.sample("wrong references", groups, studio.read(groups, others))
    return {
        "wrong": studio.judge.right(pixels, [other.facts for other in others]),
        "wrong own": studio.judge.right(pixels, [group.facts for group in groups]),
    }


def _crowded(studio: _Studio, split: DrawnSplit) -> Conditions:
    groups = split.of_kind("crowded")
    one, averaged = studio.read(groups, most=1), studio.read(groups, average=True)
    return {
        "crowded 4": studio.make("crowded, 4 references", groups, studio.read(groups)),
        "crowded 1": studio.make("crowded, 1 reference", groups, one),
        "crowded average": studio.make("crowded, averaged", groups, averaged),
    }


def _style(studio: _Studio, split: DrawnSplit) -> Conditions:
    groups = split.of_kind("style")
    return {"style": studio.make("styles", groups, studio.read(groups))}


def _compared(studio: _Studio, split: DrawnSplit, name: str) -> Conditions:
    results = {}
    for key, kind in (("easyref", "identity"), ("crowded 4", "crowded")):
        groups = split.of_kind(kind)
        tokens = studio.read(groups, average=name == AVERAGING)
        results[f"{name} {key}"] = studio.make(f"{name}, {key}", groups, tokens)
    return results


@dataclass(frozen=True)
class _Studio:
    """One adapter's pictures, and their scores."""

    models: DemoModels
    judge: Judge
    settings: Settings
    adapter: DemoAdapter
    report: Report

    def read(
        self,
        groups: Sequence[Group],
        sources: Sequence[Group] | None = None,
        most: int = REFERENCES,
        average: bool = False,
    ) -> Steering:
        """The groups' references at work, with each target's caption.

        Args:
            sources: groups whose references are read instead.
        """
        pictures = [open_pictures(source.references[:most]) for source in sources or groups]
        tokens = self.adapter.encode(pictures, [group.caption for group in groups], average)
        return Steering(self.adapter, tokens)

    def sample(
        self,
        name: str,
        groups: Sequence[Group],
        steering: Steering | None = None,
        outlines: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One picture a group."""
        self.report(f"{name}: {len(groups)} pictures")
        captions, seeds = zip(*((g.caption, _SEED + g.number) for g in groups), strict=True)
        return self.models.sample(captions, seeds, self.settings, steering, outlines)

    def make(
        self,
        name: str,
        groups: Sequence[Group],
        steering: Steering | None = None,
        weight: float = 1.0,
        outlines: torch.Tensor | None = None,
    ) -> dict[str, list[float]]:
        """Scores of one picture a group, against the group's own facts and outline."""
        if steering is not None:
            steering = replace(steering, weight=weight)
        pixels = self.sample(name, groups, steering, outlines)
        scores = self.judge.right(pixels, [group.facts for group in groups])
        wanted = read_outlines(groups, self.settings.side)
        return scores | {OUTLINE: overlap(pixels, wanted).tolist()}
