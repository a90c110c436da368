"""Variants x groups -> trials, chosen from the seed alone, in batches that never change."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..files import WINDOWS_DEVICES
from .groups import GroupPicture, ReferenceGroup
from .methods import USES
from .trials import NEWER, Trial, Variant

if TYPE_CHECKING:
    from .protocols import Preset
    from .settings import BenchSettings

Pairing = Literal["others", "itself", "all"]
"""References and targets of a group: one target and the others as its references; each picture as
its own reference; all pictures as both."""

_ALWAYS = ("method", "steps", "guidance")  # matter to every method
_SHORT = {"insert_before": "insert before", "image_size": "image size"}
_LONGEST_SLUG = 80  # characters


def make_variants(
    settings: BenchSettings, methods: Iterable[str], preset: Preset, most: int
) -> list[Variant]:
    """Every combination of the varied values, for each method, once.

    Fields that a method does not use keep their defaults, so that "none" is not generated once a
    weight.

    Args:
        preset: what it varies, and its number of references, count where the settings say nothing.
        most: references that a group has. Of the preset's numbers beyond that only the first is
            kept, as the others change nothing.
    """
    base = {
        name: getattr(settings, name)
        for name in ("weight", "insert_before", "image_size", "steps", "guidance", *NEWER)
    }
    asked = settings.references
    base["references"] = preset.references if asked is None else asked
    varied = dict(preset.vary)
    if "references" in varied:
        counts = sorted(varied["references"])
        enough = bisect.bisect_left(counts, most)  # of the first that uses all of a group
        varied["references"] = tuple(counts[: enough + 1])
    given = dataclasses.asdict(settings.vary)
    varied.update({name: values for name, values in given.items() if values})
    variants: dict[Variant, None] = {}
    for method in methods:
        used = {*USES[method], *_ALWAYS}
        for values in product(*varied.values()):
            fields = {**base, **dict(zip(varied, values, strict=True))}
            kept = {name: value for name, value in fields.items() if name in used}
            variants[Variant(method, **kept)] = None
    return list(variants)


def labels(variants: Sequence[Variant]) -> dict[Variant, str]:
    """A name for each variant: its method, and what it differs in from others of that method."""
    named: dict[Variant, str] = {}
    for method in dict.fromkeys(variant.method for variant in variants):
        of_method = [variant for variant in variants if variant.method == method]
        parts = [method] * len(of_method)
        for field in dataclasses.fields(Variant):
            values = [getattr(variant, field.name) for variant in of_method]
            if len(set(values)) > 1:
                texts = _texts(field.name, values)
                parts = [f"{part}, {text}" for part, text in zip(parts, texts, strict=True)]
        named.update(zip(of_method, parts, strict=True))
    return named


def _texts(name: str, values: Sequence[object]) -> list[str]:
    if name == "adapter":
        return _short_paths([str(value) for value in values])
    if name == "references":
        return [_count_text(value) for value in values]
    return [
        f"{_SHORT.get(name, name)} {str(value).removesuffix('.0') or 'none'}" for value in values
    ]


def _count_text(value: object) -> str:
    return {0: "all references", 1: "1 reference"}.get(value, f"{value} references")  # type: ignore[call-overload]


def _short_paths(paths: Sequence[str]) -> list[str]:
    """As much of each path's end as tells them apart."""
    distinct = {Path(path) for path in paths}
    for length in range(1, max(len(path.parts) for path in distinct) + 1):
        if len({path.parts[-length:] for path in distinct}) == len(distinct):
            break
    return ["/".join(Path(path).parts[-length:]) or "no adapter" for path in paths]


def plan_trials(
    groups: Sequence[ReferenceGroup],
    variants: Sequence[Variant],
    seed: int,
    images: int,
    pairing: Pairing = "others",
) -> list[Trial]:
    """All trials, variant by variant, group by group.

    Target, references and noise come from the seed, the group's name and the image's number: they
    are equal for all variants, and fewer references are the first of more.

    Args:
        images: per group, and per prompt where a group has prompts.
    """
    slugs = _unique(group.name for group in groups)
    named = labels(variants)
    folders = _unique(named.values())
    trials = []
    for variant in variants:
        for group in groups:
            for number in range(images * max(1, len(group.prompts))):
                rng = random.Random(_hashed(seed, group.name, number))
                references, targets, prompt = _chosen(group, number, images, pairing, seed, rng)
                if variant.references:
                    references = references[: variant.references]
                trials.append(
                    Trial(
                        variant,
                        named[variant],
                        f"images/{folders[named[variant]]}/{slugs[group.name]}/{number}",
                        group.name,
                        group.split,
                        group.kind,
                        references,
                        targets,
                        prompt,
                        _hashed(seed, group.name, number, "noise") % 2**32,
                    )
                )
    return trials


def _chosen(
    group: ReferenceGroup,
    number: int,
    images: int,
    pairing: Pairing,
    seed: int,
    rng: random.Random,
) -> tuple[tuple[GroupPicture, ...], tuple[GroupPicture, ...], str]:
    """References in order, targets and the prompt of one image."""
    count = len(group.pictures)
    if pairing == "all":
        order = rng.sample(range(count), count)
        references = targets = tuple(group.pictures[n] for n in order)
        caption = ""
    else:
        target = group.target
        if target is None:
            # Every picture is the target once before one is a second time.
            order = random.Random(_hashed(seed, group.name)).sample(range(count), count)
            target = order[number % count]
        targets = (group.pictures[target],)
        others = [n for n in range(count) if n != target]
        chosen = [target] if pairing == "itself" else rng.sample(others, len(others))
        references = tuple(group.pictures[n] for n in chosen)
        caption = targets[0].caption
    prompt = group.prompts[number // images] if group.prompts else caption
    return references, targets, prompt


def _hashed(*parts: object) -> int:
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def _unique(names: Iterable[str]) -> dict[str, str]:
    """A file name for each name, readable, and different where names differ; also where case does
    not count.
    """
    slugs: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        if name in slugs:
            continue
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name.replace(", ", "_")).strip("-.")
        slug = slug[:_LONGEST_SLUG] or "group"
        if slug.split(".")[0].upper() in WINDOWS_DEVICES:
            slug = f"group-{slug}"
        if len(name) > _LONGEST_SLUG:
            slug = f"{slug}-{_hashed(name):016x}"
        while slug.casefold() in taken:  # also where a group is named like another's file
            slug = f"{slug}-{_hashed(name):016x}"
        taken.add(slug.casefold())
        slugs[name] = slug
    return slugs


def batches_of(trials: Sequence[Trial], size: int) -> list[list[Trial]]:
    """Batches of one variant each, in order. They depend on the plan alone, not on what is left,
    so that a resumed run computes the same pixels.
    """
    by_variant: dict[Variant, list[Trial]] = {}
    for trial in trials:
        by_variant.setdefault(trial.variant, []).append(trial)
    return [
        of_variant[start : start + size]
        for of_variant in by_variant.values()
        for start in range(0, len(of_variant), size)
    ]


def share_of(batches: Sequence[list[Trial]], processes: int, process: int) -> list[list[Trial]]:
    """The batches of one process. Those of a group stay together where there are groups enough,
    as a method may train on a group.
    """
    if processes == 1:
        return list(batches)
    groups = {name: n for n, name in enumerate(dict.fromkeys(b[0].group for b in batches))}
    if len(groups) >= 2 * processes:
        return [batch for batch in batches if groups[batch[0].group] % processes == process]
    return list(batches[process::processes])
