"""Which pictures make a group: by tags, without duplicates, alike; and which groups are held out.

Pure functions of tags and of embeddings.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import torch
from PIL import Image

from .tagged_pictures import Tag, TaggedPicture

_THUMBNAIL = 16  # pixels; little of what compression and resizing change is left
_SAME_LEVELS = 10  # of 255; JPEG changes a thumbnail by 5, another mouth in a drawn face by 25
_ROWS = 1024  # compared at once


def by_tag(
    pictures: Sequence[TaggedPicture], least: int, listed: Sequence[Tag] | None = None
) -> dict[Tag, list[int]]:
    """Candidates for groups: tag -> indices of its pictures. No picture is in two of them.

    A picture belongs to the group that its metadata name, else to its folder's, else to that of its
    tags which fewest pictures carry: "blue hair" says more of it than "1 girl". Tags of fewer than
    `least` pictures make no group; nor do those of more than half of all, unless they have a kind.

    Args:
        listed: the only tags that make groups, folders included, where the metadata name none.
    """
    found: dict[Tag, list[int]] = defaultdict(list)
    wanted = set(listed or ())
    by_name = {tag.name: tag for tag in wanted}

    def choices(picture: TaggedPicture) -> set[Tag]:
        tags = {*picture.tags, *([picture.folder] if picture.folder else [])}
        if listed is None:
            return tags
        # A list names the kind once, for pictures whose tags do not.
        return {tag if tag in wanted else by_name[tag.name] for tag in tags if tag.name in by_name}

    counts = Counter(tag for picture in pictures for tag in choices(picture))
    for index, picture in enumerate(pictures):
        if picture.group is not None:
            found[picture.group].append(index)
            continue
        if picture.folder is not None and listed is None:
            found[picture.folder].append(index)
            continue
        usable = [tag for tag in choices(picture) if counts[tag] >= least]
        if listed is None:
            usable = [tag for tag in usable if tag.kind or counts[tag] <= len(pictures) / 2]
        if usable:
            found[min(usable, key=lambda tag: (counts[tag], tag.name, tag.kind))].append(index)
    return dict(sorted(found.items(), key=lambda item: (item[0].kind, item[0].name)))


def thumbnail(picture: Image.Image) -> torch.Tensor:
    """A picture in so few pixels that copies of it look equal: [768], brightness and colour."""
    size = (_THUMBNAIL, _THUMBNAIL)
    small = picture.convert("YCbCr").resize(size, Image.Resampling.BILINEAR)
    return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).float() - 128


def same_pixels(thumbnails: torch.Tensor) -> dict[int, int]:
    """Copies, also compressed or resized ones: index -> index of the earlier picture it repeats.

    They differ a little everywhere, another drawing of the same much in one place.

    Args:
        thumbnails: [N, 768].
    """
    squares = thumbnails.square().sum(1)
    most = _SAME_LEVELS**2 * thumbnails.shape[1]

    def near(start: int, end: int) -> torch.Tensor:
        products = thumbnails[start:end] @ thumbnails[:end].T
        found = squares[start:end, None] + squares[None, :end] - 2 * products <= most
        rows, columns = found.tril(start - 1).nonzero(as_tuple=True)
        for few in range(0, len(rows), _ROWS):
            row, column = rows[few : few + _ROWS], columns[few : few + _ROWS]
            differences = (thumbnails[start + row] - thumbnails[column]).abs().amax(1)
            found[row, column] = differences <= _SAME_LEVELS
        return found

    return _repeated(len(thumbnails), near)


def near_duplicates(embeddings: torch.Tensor, similarity: float) -> dict[int, int]:
    """Pictures that an encoder takes for the same: index -> index of the earlier one.

    Args:
        embeddings: [N, width], of length 1.
    """
    return _repeated(len(embeddings), lambda a, b: embeddings[a:b] @ embeddings[:b].T >= similarity)


def _repeated(count: int, near: Callable[[int, int], torch.Tensor]) -> dict[int, int]:
    """
    Args:
        near: (first row, last row + 1) -> whether each is near each of the pictures up to there.
    """
    repeated: dict[int, int] = {}
    for start in range(0, count, _ROWS):
        end = min(start + _ROWS, count)
        rows = near(start, end).tril(start - 1)
        for row in rows.any(1).nonzero().flatten().tolist():
            earlier = rows[row].nonzero().flatten().tolist()
            kept = next((index for index in earlier if index not in repeated), None)
            if kept is not None:
                repeated[start + row] = kept
    return repeated


def outliers(embeddings: torch.Tensor, least: float) -> list[int]:
    """Pictures unlike the rest of their group: the least similar is taken out until all that are
    left have a mean similarity to the others of at least `least`.

    Args:
        embeddings: [N, width], of length 1.
    """
    total = embeddings.sum(0)
    left = list(range(len(embeddings)))
    out: list[int] = []
    while len(left) > 1:
        means = (embeddings[left] @ total - 1) / (len(left) - 1)
        worst = int(means.argmin())
        if means[worst] >= least:
            break
        total = total - embeddings[left[worst]]
        out.append(left.pop(worst))
    return sorted(out)


def strangers(faces: torch.Tensor, distance: float) -> list[int]:
    """Faces of other people than the rest of their group: the farthest is taken out until all that
    are left have a mean distance to the others of at most `distance`.

    Args:
        faces: [N, width].
    """
    distances = torch.cdist(faces, faces)
    left = list(range(len(faces)))
    out: list[int] = []
    while len(left) > 1:
        means = distances[left][:, left].sum(1) / (len(left) - 1)
        worst = int(means.argmax())
        if means[worst] <= distance:
            break
        out.append(left.pop(worst))
    return sorted(out)


def mean_similarity(embeddings: torch.Tensor) -> float:
    """Mean cosine of all pairs of a group of two or more."""
    count = len(embeddings)
    return float((embeddings.sum(0).square().sum() - count) / (count * (count - 1)))


def held_out(tags: Sequence[Tag], share: float, seed: int) -> set[Tag]:
    """The groups that are held out: a share of each kind, at least one of two or more.

    Which ones follows from the seed and their names, whatever other groups there are.
    """
    by_kind: dict[str, list[Tag]] = defaultdict(list)
    for tag in tags:
        by_kind[tag.kind].append(tag)
    chosen: set[Tag] = set()
    for same in by_kind.values():
        same.sort(key=lambda tag: hashlib.sha256(f"{seed} {tag.kind} {tag.name}".encode()).digest())
        count = round(len(same) * share)
        if 0 < share < 1 and len(same) > 1:
            count = min(max(count, 1), len(same) - 1)
        chosen.update(same[:count])
    return chosen
