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
    """Attribute -> 1 or 0 a picture: on drawn pictures of one figure, and on their rebuilds."""
    paths = [path for group in split.groups for path in group.alone]
    facts = [split.facts[path] for path in paths]
    pixels = read_pixels(paths)
    return judge.right(pixels, facts), judge.right(models.rebuild(pixels), facts)


def run_check(
    models: DemoModels, judge: Judge, split: DrawnSplit, options: CheckOptions, report: Report
) -> dict[str, dict[str, list[float]]]:
    """Generate and judge everything.

    Args:
        report: told what is being made, as it takes minutes.

    Returns:
        Condition -> attribute -> a score for each group.

    Raises:
        EasyRefError: an adapter that cannot be loaded or does not fit.
    """
    identity, crowded, style = map(split.of_kind, ("identity", "crowded", "style"))
    # All files are looked at before minutes are spent.
    others = {name: models.adapter(path, options.mllm) for name, path in options.compare.items()}
    studio = _Studio(models, judge, options.settings, models.adapter(), report)
    results: dict[str, dict[str, list[float]]] = {}

    results["plain"] = studio.make("no references", identity)
    tokens = studio.read(identity)
    for weight in WEIGHTS:
        made = studio.make(f"weight {weight:g}", identity, tokens, weight)
        results[f"weight {weight:g}"] = made
    results["easyref"] = results[f"weight {WEIGHTS[-1]:g}"]

    others_of = strangers(identity)
    pixels = studio.sample("wrong references", identity, studio.read(identity, others_of))
    results["wrong"] = judge.right(pixels, [other.facts for other in others_of])
    results["wrong own"] = judge.right(pixels, [group.facts for group in identity])

    if models.has_controlnet:
        outlines = read_outlines(identity, options.settings.side)
        results["control plain"] = studio.make("ControlNet", identity, outlines=outlines)
        results["control easyref"] = studio.make(
            "EasyRef and ControlNet", identity, tokens, outlines=outlines
        )

    results["crowded 4"] = studio.make("crowded, 4 references", crowded, studio.read(crowded))
    one = studio.read(crowded, most=1)
    results["crowded 1"] = studio.make("crowded, 1 reference", crowded, one)
    averaged = studio.read(crowded, average=True)
    results["crowded average"] = studio.make("crowded, averaged", crowded, averaged)
    results["style"] = studio.make("styles", style, studio.read(style))

    for name, adapter in others.items():
        other = _Studio(models, judge, options.settings, adapter, report)
        for key, groups in (("easyref", identity), ("crowded 4", crowded)):
            tokens = other.read(groups, average=name == AVERAGING)
            results[f"{name} {key}"] = other.make(f"{name}, {key}", groups, tokens)
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
