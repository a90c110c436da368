"""Samples and classifies the images of every condition.

All conditions use the same groups, prompts and noise, so they differ in the condition alone and can
be compared group by group. Images are sampled with the set's own settings, which must not be chosen
on held-out groups; the split "training" serves for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..adapter import AppliedReferences, DemoAdapter
from ..models import DemoModels
from ..pretraining.pictures import read_pixels
from ..rows import SamplingSettings
from .classifier import Classifier
from .groups import REFERENCES, DrawnSplit, Group, open_pictures, read_outlines, strangers
from .outlines import overlap
from .table_rows import AVERAGING, OUTLINE, WEIGHTS

Report = Callable[[str], None]
Conditions = dict[str, dict[str, list[float]]]
"""Condition -> attribute -> a score per group."""
_SEED = 1_000_000


@dataclass(frozen=True)
class CheckOptions:
    """
    Attributes:
        compare: name -> adapter file; see `table_rows.COMPARED`.
        mllm: Qwen2-VL directory for those of them without MLLM weights; the set's by default.
        int8: round the MLLM's weights.
    """

    settings: SamplingSettings
    compare: Mapping[str, Path] = field(default_factory=dict)
    mllm: Path | None = None
    int8: bool = False


def classifier_accuracy(
    judge: Classifier, models: DemoModels, split: DrawnSplit
) -> tuple[dict, dict]:
    """Attribute -> each group's share of images of one figure that are classified correctly: of the
    drawn images, and of their reconstructions by the autoencoder.
    """
    groups = [group.alone for group in split.groups]
    drawn = read_pixels([path for paths in groups for path in paths])
    accuracies: list[dict[str, list[float]]] = []
    for pixels in (drawn, models.reconstruct(drawn)):
        shares: dict[str, list[float]] = {}
        for paths, part in zip(groups, pixels.split([len(paths) for paths in groups]), strict=True):
            correct = judge.scores(part, [split.facts[path] for path in paths])
            for head, scores in correct.items():
                shares.setdefault(head, []).append(sum(scores) / len(scores))
        accuracies.append(shares)
    return accuracies[0], accuracies[1]


def tasks(options: CheckOptions) -> list[str]:
    """Independent parts of the evaluation, the longest first."""
    return ["identity", "crowded", *options.compare, "wrong", "style"]


def run_check(
    models: DemoModels, judge: Classifier, split: DrawnSplit, options: CheckOptions, report: Report
) -> Conditions:
    """Sample and classify everything.

    Args:
        report: called with progress messages; all takes minutes.

    Returns:
        Condition -> attribute -> a score per group.

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
    judge: Classifier,
    split: DrawnSplit,
    options: CheckOptions,
    report: Report,
) -> Conditions:
    """One of `tasks`, see `run_check`."""
    compared = options.compare.get(task)
    adapter = models.adapter(compared, options.mllm if compared else None, options.int8)
    sampler = _Sampler(models, judge, options.settings, adapter, report)
    if compared:
        return _compared(sampler, split, task)
    conditions = {"identity": _identity, "crowded": _crowded, "wrong": _wrong, "style": _style}
    return conditions[task](sampler, split)


def _identity(sampler: _Sampler, split: DrawnSplit) -> Conditions:
    groups = split.of_kind("identity")
    results = {
        "plain": sampler.score("no references", groups),
        "named": sampler.score("prompt only", groups, named=True),
    }
    tokens = sampler.encode(groups)
    for weight in WEIGHTS:
        name = f"weight {weight:g}"
        results[name] = sampler.score(name, groups, tokens, weight)
    results["easyref"] = results[f"weight {WEIGHTS[-1]:g}"]
    if sampler.models.has_controlnet:
        outlines = read_outlines(groups, sampler.settings.side)
        results["control plain"] = sampler.score("ControlNet", groups, outlines=outlines)
        results["control easyref"] = sampler.score(
            "EasyRef and ControlNet", groups, tokens, outlines=outlines
        )
    return results


def _wrong(sampler: _Sampler, split: DrawnSplit) -> Conditions:
    groups = split.of_kind("identity")
    others = strangers(groups)
    pixels = sampler.sample("wrong references", groups, sampler.encode(groups, others))
    return {
        "wrong": sampler.judge.scores(pixels, [other.facts for other in others]),
        "wrong own": sampler.judge.scores(pixels, [group.facts for group in groups]),
    }


def _crowded(sampler: _Sampler, split: DrawnSplit) -> Conditions:
    groups = split.of_kind("crowded")
    one, averaged = sampler.encode(groups, most=1), sampler.encode(groups, average=True)
    return {
        "crowded 4": sampler.score("crowded, 4 references", groups, sampler.encode(groups)),
        "crowded 1": sampler.score("crowded, 1 reference", groups, one),
        "crowded average": sampler.score("crowded, averaged", groups, averaged),
    }


def _style(sampler: _Sampler, split: DrawnSplit) -> Conditions:
    groups = split.of_kind("style")
    return {
        "style": sampler.score("styles", groups, sampler.encode(groups)),
        "named style": sampler.score("styles, prompt only", groups, named=True),
    }


def _compared(sampler: _Sampler, split: DrawnSplit, name: str) -> Conditions:
    results = {}
    for key, kind in (("easyref", "identity"), ("crowded 4", "crowded")):
        groups = split.of_kind(kind)
        tokens = sampler.encode(groups, average=name == AVERAGING)
        results[f"{name} {key}"] = sampler.score(f"{name}, {key}", groups, tokens)
    return results


@dataclass(frozen=True)
class _Sampler:
    """Samples one adapter's images, and scores them."""

    models: DemoModels
    judge: Classifier
    settings: SamplingSettings
    adapter: DemoAdapter
    report: Report

    def encode(
        self,
        groups: Sequence[Group],
        sources: Sequence[Group] | None = None,
        most: int = REFERENCES,
        average: bool = False,
    ) -> AppliedReferences:
        """Encode the groups' references, each with its target's caption.

        Args:
            sources: groups whose references are used instead.
        """
        pictures = [open_pictures(source.references[:most]) for source in sources or groups]
        tokens = self.adapter.encode(pictures, [group.caption for group in groups], average)
        return AppliedReferences(self.adapter, tokens)

    def sample(
        self,
        name: str,
        groups: Sequence[Group],
        applied: AppliedReferences | None = None,
        outlines: torch.Tensor | None = None,
        named: bool = False,
    ) -> torch.Tensor:
        """One image per group, uint8 [B, 3, S, S].

        Args:
            named: the prompt names the character, or the style, too.
        """
        self.report(f"{name}: {len(groups)} pictures")
        prompts = [group.full_caption if named else group.caption for group in groups]
        seeds = [_SEED + group.number for group in groups]
        return self.models.sample(prompts, seeds, self.settings, applied, outlines)

    def score(
        self,
        name: str,
        groups: Sequence[Group],
        applied: AppliedReferences | None = None,
        weight: float = 1.0,
        outlines: torch.Tensor | None = None,
        named: bool = False,
    ) -> dict[str, list[float]]:
        """Scores of one image per group, against the group's own facts and outline.

        Args:
            weight: of EasyRef's cross-attention.
            named: see `sample`.
        """
        if applied is not None:
            applied = replace(applied, weight=weight)
        pixels = self.sample(name, groups, applied, outlines, named)
        scores = self.judge.scores(pixels, [group.facts for group in groups])
        expected = read_outlines(groups, self.settings.side)
        return scores | {OUTLINE: overlap(pixels, expected).tolist()}
