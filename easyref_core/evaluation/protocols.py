"""Presets: the published protocols as groups, pairings, methods and variations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EasyRefError
from ..untrusted import escaped
from .groups import ReferenceGroup
from .planning import Pairing
from .read_datasets import read_coco, read_dreambooth, read_multibanana
from .read_groups import named_apart, read_groups

if TYPE_CHECKING:
    from .settings import BenchSettings

_GROUPS = (
    "DIR/GROUP/*.png or DIR/held_in/GROUP and DIR/held_out/GROUP, with captions in metadata.jsonl "
    "or PICTURE.txt, or training data as held_in.json and held_out.json"
)
_NOT_PUBLISHED = (
    "The pictures of MRBench were announced, but are not published: name any folder of groups; "
    "easyref build-groups makes one of tagged pictures as the paper does."
)


@dataclass(frozen=True)
class Preset:
    """A protocol of the paper (arXiv 2412.09618), or of another benchmark.

    Attributes:
        layout: of the folder that it expects.
        origin: where its pictures are to be had, a sentence.
        read: the groups of a folder, and notes on what was left out.
        pairing: see `planning.Pairing`.
        methods: that it compares where the command names none, in the table's order, as far as
            their files are given.
        vary: settings that it varies, where the command does not.
        references: the most that are used; 0 for all.
        images: per group and prompt.
    """

    layout: str = _GROUPS
    origin: str = _NOT_PUBLISHED
    read: Callable[[Path, list[str]], list[ReferenceGroup]] = read_groups
    pairing: Pairing = "others"
    methods: tuple[str, ...] = (
        "easyref",
        "average",
        "concatenate",
        "ip-adapter",
        "none",
    )
    vary: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    references: int = 0
    images: int = 1


PRESETS: dict[str, Preset] = {
    "mrbench": Preset(),
    "coco": Preset(
        layout="DIR/annotations/captions_val2017.json and DIR/val2017/*.jpg, or any folder of "
        "pictures with captions in metadata.jsonl or PICTURE.txt",
        origin="The pictures are COCO's 2017 Val images, with 2017 Train/Val annotations, from "
        "cocodataset.org.",
        read=read_coco,
        pairing="itself",
        methods=("easyref", "ip-adapter", "none"),
    ),
    "dreambooth": Preset(
        layout="DIR/SUBJECT/*.jpg and DIR/prompts_and_classes.txt",
        origin="The pictures are the folder dataset of google/dreambooth on GitHub.",
        read=read_dreambooth,
        pairing="all",
        images=4,
    ),
    "multibanana": Preset(
        layout="DIR/TASK/SET_0.jpg, SET_1.jpg, ... and SET_prompt.txt",
        origin="The pictures are the data set kohsei/MultiBanana-Benchmark on the Hugging Face "
        "hub (CC BY-NC 4.0).",
        read=read_multibanana,
        pairing="all",
        references=8,
    ),
    "aggregation": Preset(
        methods=("easyref", "average", "concatenate"),
    ),
    "tokens": Preset(
        methods=("easyref",),
        vary={"insert_before": (1, 2, 3)},
    ),
    "group-size": Preset(
        methods=("easyref", "average", "concatenate"),
        vary={"references": (1, 2, 4, 8, 16, 32, 64, 112)},
    ),
}


def read_preset_groups(name: str, path: Path, notes: list[str]) -> list[ReferenceGroup]:
    """The groups of a preset, unexamined.

    Raises:
        EasyRefError: there is nothing of the expected layout; where it is to be had.
    """
    preset = PRESETS[name]
    try:
        groups = preset.read(path, notes)
        if not groups:
            said = f" {notes[0]}" if notes else ""
            raise EasyRefError(f"There are no groups of pictures in {escaped(str(path))}.{said}")
    except EasyRefError as error:
        raise EasyRefError(
            f"{error} The protocol {name} expects {preset.layout}. {preset.origin}"
        ) from error
    return named_apart(groups)


_NEEDS = {
    "ip-adapter": ("ip_adapter", "image_encoder"),
    **dict.fromkeys(("easyref", "easyref-other", "average", "concatenate"), ("adapter", "mllm")),
}


def chosen_methods(settings: BenchSettings, notes: list[str]) -> list[str]:
    """The methods that are named, or else those of the preset whose files are given.

    Args:
        notes: gets a sentence for each one that is left out.

    Raises:
        EasyRefError: none is left.
    """
    if settings.methods:
        return list(dict.fromkeys(settings.methods))
    chosen = []
    for name in PRESETS[settings.protocol].methods:
        missing = [option for option in _NEEDS.get(name, ()) if not _is_given(settings, option)]
        if missing:
            options = " and ".join(f"--{option.replace('_', '-')}" for option in missing)
            notes.append(f"{name} is left out: it needs {options}.")
        else:
            chosen.append(name)
    if not chosen:
        raise EasyRefError(f"There is nothing to generate with: {' '.join(notes)}")
    return chosen


def _is_given(settings: BenchSettings, option: str) -> bool:
    return bool(getattr(settings, option) or (option == "adapter" and settings.vary.adapter))
