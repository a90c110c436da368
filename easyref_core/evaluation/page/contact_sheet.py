"""The contact sheet: references, target and each variant's image, group by group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import EasyRefError
from ...untrusted import inside
from .record import RunRecord, TrialRecord, text_of
from .score_table import SPLITS, number_text
from .series import colours
from .thumbnails import Thumbnail, Thumbnails, make_thumbnails

_MOST_REFERENCES, _MOST_TARGETS = 9, 2  # shown of a group
_MOST_IMAGES = 6000
_SCORES = 4  # under an image
_BYTES_PER_IMAGE = 900  # of HTML around it


@dataclass(frozen=True)
class Tile:
    """One image of a variant.

    Attributes:
        picture: None where there is none; `missing` says why.
        scores: (title, number).
    """

    label: str
    method: str
    colour: int
    picture: Thumbnail | None
    missing: str
    scores: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Example:
    """What all variants made of one prompt and seed."""

    prompt: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Block:
    """A group: its pictures, and examples.

    Attributes:
        references, targets: None for one that cannot be read.
        more: references that are not shown.
    """

    group: str
    split: str
    kind: str
    references: tuple[Thumbnail | None, ...]
    more: int
    targets: tuple[Thumbnail | None, ...]
    examples: tuple[Example, ...]

    @property
    def across(self) -> int:
        """References beside each other in their square."""
        count = len(self.references)
        return 1 if count < 2 else 2 if count < 5 else 3


@dataclass(frozen=True)
class ContactSheet:
    """
    Attributes:
        groups, images: shown.
        all_groups, all_images: of the run.
        notes: what was left out and why, one sentence each.
    """

    blocks: tuple[Block, ...]
    groups: int
    images: int
    all_groups: int
    all_images: int
    longest: int
    notes: tuple[str, ...]


_Example = tuple[TrialRecord, ...]


def contact_sheet(run: RunRecord, limit: int) -> ContactSheet:
    """The images of as many groups as fit, evenly chosen.

    Args:
        limit: characters of HTML that it may take.
    """
    examples = _examples(run.trials)
    most = max((len(example) for example in examples), default=1)
    counts = _falling(min(len(examples), max(1, _MOST_IMAGES // most))) if limit > 0 else []

    def choose(count: int) -> dict[Path, float]:
        shares: dict[Path, float] = {}
        for block in _blocks(_spread(examples, count)):
            for name, share in _pictures(block):
                path = Path(name) if share else _image(run, name)
                if path is not None:
                    shares[path] = max(shares.get(path, 0), share or 1.0)
        return shares

    def left(count: int) -> int:
        images = sum(len(example) for example in _spread(examples, count))
        return limit - _BYTES_PER_IMAGE * (images + _MOST_REFERENCES * count)

    thumbnails, count = make_thumbnails(choose, counts, left)
    chosen = _spread(examples, count)
    blocks = tuple(_block(run, block, thumbnails) for block in _blocks(chosen))
    groups = len({example[0].group for example in chosen})
    images = sum(len(example) for example in chosen)
    all_groups = len({trial.group for trial in run.trials})
    return ContactSheet(
        *(blocks, groups, images, all_groups, len(run.trials), thumbnails.longest),
        notes=tuple(_notes(run, thumbnails, groups, all_groups, images)),
    )


def _notes(
    run: RunRecord, thumbnails: Thumbnails, groups: int, all_groups: int, images: int
) -> list[str]:
    notes = []
    if images < len(run.trials):
        notes.append(
            f"So that this page stays small, {images:,} of {len(run.trials):,} images are shown, "
            f"from {groups} of {all_groups} groups, evenly chosen. All are in the run's folder."
        )
    if thumbnails.unreadable:
        count = len(thumbnails.unreadable)
        why = text_of(next(iter(thumbnails.unreadable.values())))
        notes.append(f"Pictures that cannot be read are not shown: {count:,}. The first: {why}")
    return notes


def _examples(trials: Sequence[TrialRecord]) -> list[_Example]:
    """Trials that belong side by side: the first of every group, then the second ones, ..."""
    found: dict[tuple[str, int, str], list[TrialRecord]] = {}
    for trial in trials:
        found.setdefault((trial.group, trial.seed, trial.prompt), []).append(trial)
    rank: dict[str, int] = {}
    ranked = []
    for key, example in found.items():
        rank[key[0]] = rank.get(key[0], -1) + 1
        ranked.append((rank[key[0]], tuple(example)))
    return [example for _, example in sorted(ranked, key=lambda pair: pair[0])]


def _falling(count: int) -> list[int]:
    """Numbers of examples to try, each three quarters of the one before."""
    found = []
    while count > 0:
        found.append(count)
        count = count * 3 // 4
    return found


def _spread(examples: Sequence[_Example], count: int) -> list[_Example]:
    """So many examples: the first of each group before the second ones, evenly chosen."""
    groups = len({example[0].group for example in examples})
    if count >= groups:
        return list(examples[:count])
    return [examples[number * groups // count] for number in range(count)]


def _blocks(examples: Sequence[_Example]) -> list[list[_Example]]:
    """Examples of one group and target together, in the order of the groups."""
    found: dict[tuple[str, tuple[str, ...]], list[_Example]] = {}
    for example in examples:
        found.setdefault((example[0].group, example[0].targets), []).append(example)
    return list(found.values())


def _references(block: Sequence[_Example]) -> tuple[str, ...]:
    """The longest list of references that one of the images has."""
    return max((trial.references for example in block for trial in example), key=len, default=())


def _pictures(block: Sequence[_Example]) -> list[tuple[str, float]]:
    """The pictures of a block, with their share of the largest size; 0 for an image of the run."""
    references = _references(block)[:_MOST_REFERENCES]
    share = 1.0 if len(references) < 2 else 0.5 if len(references) < 5 else 0.4
    images = [(trial.path, 0.0) for example in block for trial in example if not trial.failed]
    targets = [(name, 1.0) for name in block[0][0].targets[:_MOST_TARGETS]]
    return [*((name, share) for name in references), *targets, *images]


def _image(run: RunRecord, name: str) -> Path | None:
    try:
        return inside(run.folder, f"{name}.png", "image")
    except EasyRefError:
        return None


def _block(run: RunRecord, block: Sequence[_Example], thumbnails: Thumbnails) -> Block:
    first, references = block[0][0], _references(block)
    found = thumbnails.found.get
    return Block(
        group=first.group,
        split=SPLITS.get(first.split, first.split),
        kind=first.kind,
        references=tuple(found(Path(name)) for name in references[:_MOST_REFERENCES]),
        more=max(0, len(references) - _MOST_REFERENCES),
        targets=tuple(found(Path(name)) for name in first.targets[:_MOST_TARGETS]),
        examples=tuple(
            Example(example[0].prompt, tuple(_tile(run, trial, thumbnails) for trial in example))
            for example in block
        ),
    )


def _tile(run: RunRecord, trial: TrialRecord, thumbnails: Thumbnails) -> Tile:
    path = None if trial.failed else _image(run, trial.path)
    picture = thumbnails.found.get(path) if path is not None else None
    missing = "" if picture else trial.failed or "The image cannot be read."
    scores = [
        (column.title, number_text(trial.scores[column.name], abs(trial.scores[column.name])))
        for column in run.columns
        if column.name in trial.scores
    ]
    colour = colours(run).get(trial.method, 0)
    return Tile(trial.label, trial.method, colour, picture, missing, tuple(scores[:_SCORES]))
