"""Make groups as the paper's MRBench has them, from a folder of tagged pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from ...errors import EasyRefError
from ...files import check_apart, check_place
from ...pictures.loading import open_picture
from ...untrusted import escaped, number, shown, whole_number
from . import grouping
from .group_files import BuiltGroup, LeftOut, write_groups
from .tagged_pictures import Tag, TaggedPicture, read_tag_list, read_tagged

_LONGEST_SIDE = 1024  # pixels; encoders take a quarter
_LONGEST_LICENCE = 200  # characters
_SHOWN = 10  # notes of one kind


class PictureEncoder(Protocol):
    """CLIP, or what takes its place; embeddings have length 1."""

    def picture(self, image: Image.Image) -> torch.Tensor:
        """[width]"""
        ...

    def text(self, text: str) -> torch.Tensor:
        """[width]"""
        ...


class FaceEncoder(Protocol):
    """A model of faces."""

    same_person: float
    """The largest Euclidean distance of two pictures of one person."""

    def embed_face(self, picture: Image.Image) -> torch.Tensor | None:
        """[width], of the largest face; None where none is found."""
        ...


@dataclass(frozen=True)
class BuildOptions:
    """What becomes a group.

    Attributes:
        tags: a file with the tags that make groups, one a line; None for all that are found.
        least: pictures of a group.
        held_out: share of the groups, of each kind.
        duplicate: pictures whose embeddings are this similar count as one, a cosine.
        like_tag: the least cosine of a picture and its tag's text.
        like_group: the least mean cosine of a picture and the others of its group.
        licence: of pictures whose tags do not say it.
    """

    pictures: Path
    out: Path
    tags: Path | None = None
    least: int = 4
    held_out: float = 0.25
    seed: int = 0
    duplicate: float = 0.97
    like_tag: float = 0.15
    like_group: float = 0.5
    licence: str = ""

    def check(self) -> None:
        """
        Raises:
            EasyRefError: a number out of range, or a place where nothing can be written.
        """
        whole_number(self.least, "--least", 2, 1_000_000, "A target and one reference.")
        number(self.held_out, "--held-out", 0, 1)
        whole_number(self.seed, "--seed")
        for name in ("duplicate", "like_tag", "like_group"):
            number(getattr(self, name), f"--{name.replace('_', '-')}", -1, 1.01)
        if not self.licence.isprintable() or len(self.licence) > _LONGEST_LICENCE:
            raise EasyRefError(f"--licence is {shown(self.licence)}; a short name is needed.")
        check_apart(self.out, [self.pictures])
        check_place(self.out / "groups.csv")
        if self.out.exists() and any(self.out.iterdir()):
            raise EasyRefError(
                f"{escaped(str(self.out))} is not empty. Choose another folder for the groups."
            )


@dataclass
class BuildReport:
    """What was built.

    Attributes:
        left_out: pictures that are in no group, with the reason.
        notes: what the reader should know, in sentences.
    """

    groups: list[BuiltGroup] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def reasons(self) -> list[str]:
        """How many pictures were left out for which reason, such as "3 unreadable"."""
        counts = Counter(out.reason for out in self.left_out)
        return [f"{count} {reason}" for reason, count in sorted(counts.items())]

    def __str__(self) -> str:
        lines = list(self.notes)
        for split in ("held_in", "held_out"):
            chosen = [group for group in self.groups if group.split == split]
            count = sum(len(group.pictures) for group in chosen)
            lines.append(f"{split}: {len(chosen)} groups, {count} pictures")
        return "\n".join([*lines, *(f"left out: {reason}" for reason in self.reasons())])


@dataclass
class _Candidates:
    """Candidates for groups, of which pictures are left out one after another.

    Attributes:
        order: indices of grouped pictures; of two that are the same the earlier one stays.
        thumbnails, embeddings: of the pictures in `order`, [N, values].
        faces: index -> embedding, where a face was found.
    """

    pictures: list[TaggedPicture]
    tags: dict[int, Tag]
    left_out: dict[int, LeftOut] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    thumbnails: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 1))
    embeddings: torch.Tensor | None = None
    faces: dict[int, torch.Tensor] = field(default_factory=dict)

    def leave_out(self, index: int, reason: str, detail: str = "") -> None:
        tag = self.tags.get(index)
        self.left_out[index] = LeftOut(self.pictures[index].name, tag, reason, detail)

    def places(self) -> dict[Tag, list[int]]:
        """Tag -> places in `order` of the pictures that are left."""
        found: dict[Tag, list[int]] = {tag: [] for tag in dict.fromkeys(self.tags.values())}
        for place, index in enumerate(self.order):
            if index not in self.left_out:
                found[self.tags[index]].append(place)
        return found


def build_groups(
    options: BuildOptions,
    encoder: PictureEncoder | None = None,
    faces: FaceEncoder | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BuildReport:
    """Make groups and write them to `options.out`: `held_in/GROUP/` and `held_out/GROUP/`, each
    with pictures and `metadata.jsonl`; `groups.csv`, `left_out.csv`.

    The same pictures, options and models give the same files.

    Args:
        encoder: without one, groups follow tags, folders and decoded pixels alone.
        faces: for groups most of whose pictures show a face.
        progress: called with the pictures that are read, and all.

    Raises:
        EasyRefError: an option, the folder or a tag list cannot be used, or no group is left.
    """
    options.check()
    listed = None if options.tags is None else read_tag_list(options.tags)
    folder = read_tagged(options.pictures)
    groups = grouping.by_tag(folder.pictures, options.least, listed)
    found = _Candidates(folder.pictures, {n: tag for tag, same in groups.items() for n in same})
    for index in range(len(folder.pictures)):
        if index not in found.tags:
            found.leave_out(index, "without a tag that makes a group")
    _look(found, encoder, faces, progress)
    _leave_out_copies(found, options)
    if encoder is not None:
        _leave_out_unlike(found, encoder, options)
    if faces is not None:
        _leave_out_strangers(found, faces)
    built = _groups_left(found, options)
    left_out = [found.left_out[index] for index in sorted(found.left_out)]
    report = BuildReport(built, left_out, _notes(folder.problems, encoder))
    if not built:
        reasons = "; ".join(report.reasons())
        raise EasyRefError(
            f"No group of {options.least} or more pictures is left in "
            f"{escaped(str(options.pictures))}; left out: {reasons}. Give pictures tags in common, "
            "or change --least or the similarities."
        )
    write_groups(options.out, built, left_out)
    return report


def _notes(problems: list[str], encoder: PictureEncoder | None) -> list[str]:
    notes = [f"{problem.removesuffix('.')}; passed over." for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        notes.append(f"{len(problems) - _SHOWN} more texts of pictures were passed over.")
    if encoder is None:
        notes.append("No CLIP was named (--clip): groups follow tags, folders and equal pixels.")
    return notes


def _look(
    found: _Candidates,
    encoder: PictureEncoder | None,
    faces: FaceEncoder | None,
    progress: Callable[[int, int], None],
) -> None:
    """Open each picture once, and keep what is compared."""
    sizes: dict[int, int] = {}
    thumbnails: dict[int, torch.Tensor] = {}
    embeddings: dict[int, torch.Tensor] = {}
    for done, index in enumerate(found.tags):
        progress(done, len(found.tags))
        try:
            picture = open_picture(found.pictures[index].path, longest=_LONGEST_SIDE)
        except EasyRefError as error:
            found.leave_out(index, "unreadable", str(error))
            continue
        sizes[index] = picture.width * picture.height
        thumbnails[index] = grouping.thumbnail(picture)
        if encoder is not None:
            embeddings[index] = encoder.picture(picture)
        face = None if faces is None else faces.embed_face(picture)
        if face is not None:
            found.faces[index] = face
    progress(len(found.tags), len(found.tags))
    # Of two copies the larger one stays.
    found.order = sorted(sizes, key=lambda index: (-sizes[index], index))
    if found.order:
        found.thumbnails = torch.stack([thumbnails[index] for index in found.order])
        if encoder is not None:
            found.embeddings = torch.stack([embeddings[index] for index in found.order])


def _leave_out_copies(found: _Candidates, options: BuildOptions) -> None:
    """Copies are looked for in all groups: one in another split would give the answer away."""
    repeated = [("nearly the same pixels as another", grouping.same_pixels(found.thumbnails))]
    if found.embeddings is not None:
        near = grouping.near_duplicates(found.embeddings, options.duplicate)
        repeated.append(("nearly the same as another", near))
    for reason, pairs in repeated:
        for place, earlier in pairs.items():
            index, other = found.order[place], found.order[earlier]
            if index not in found.left_out and other not in found.left_out:
                found.leave_out(index, reason, found.pictures[other].name)


def _leave_out_unlike(found: _Candidates, encoder: PictureEncoder, options: BuildOptions) -> None:
    """Pictures that do not show their tag, or look unlike the others of their group."""
    places = found.places()
    if found.embeddings is None:
        return
    for tag, same in places.items():
        similar = found.embeddings[same] @ encoder.text(tag.name)
        for place, cosine in zip(same, similar.tolist(), strict=True):
            if cosine < options.like_tag:
                detail = f"{cosine:.3f} to {tag.name}"
                found.leave_out(found.order[place], "unlike its tag", detail)
    for same in found.places().values():
        for number_ in grouping.outliers(found.embeddings[same], options.like_group):
            found.leave_out(found.order[same[number_]], "unlike its group")


def _leave_out_strangers(found: _Candidates, faces: FaceEncoder) -> None:
    """Where most pictures show a face, the others and those of other people."""
    for same in found.places().values():
        shown = [place for place in same if found.order[place] in found.faces]
        if 2 * len(shown) <= len(same):
            continue
        for place in set(same) - set(shown):
            found.leave_out(found.order[place], "without a face")
        embeddings = torch.stack([found.faces[found.order[place]] for place in shown])
        for number_ in grouping.strangers(embeddings, faces.same_person):
            found.leave_out(found.order[shown[number_]], "with another face")


def _groups_left(found: _Candidates, options: BuildOptions) -> list[BuiltGroup]:
    places = found.places()
    for same in places.values():
        if len(same) < options.least:
            for place in same:
                found.leave_out(found.order[place], "of too small a group")
    large = {tag: same for tag, same in places.items() if len(same) >= options.least}
    out = grouping.held_out(list(large), options.held_out, options.seed)
    counts = Counter(gone.tag for gone in found.left_out.values())
    return [
        BuiltGroup(
            tag,
            "held_out" if tag in out else "held_in",
            tuple(
                replace(picture, licence=picture.licence or options.licence)
                for picture in (found.pictures[n] for n in sorted(found.order[p] for p in same))
            ),
            None if found.embeddings is None else grouping.mean_similarity(found.embeddings[same]),
            counts[tag],
        )
        for tag, same in large.items()
    ]
