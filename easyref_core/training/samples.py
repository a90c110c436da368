"""Training samples of records, the same on any number of processes.

A sample is identified by its position in an endless sequence of shuffled epochs; all its randomness
comes from the run's seed and that position.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from PIL import Image
from torch.utils.data import Dataset

from ..adapter.identity import reference_size
from ..errors import EasyRefError
from ..pictures.preprocessing import Patches, black_picture, preprocess
from .augment import (
    Target,
    aspect_target,
    choose_references,
    face_crop,
    square_corner,
    square_crop,
)
from .config import DataSettings
from .records import PictureSource, Record


@dataclass(frozen=True)
class Sample:
    """One training sample.

    Attributes:
        position: in the sequence; seeds its noise and timestep.
        record: name of the record it was made from.
        source: fingerprint of its target's file.
        target: [3, H, W] in -1..1.
        time_ids: SDXL's six size numbers.
        text: caption, empty where dropped.
        references: preprocessed images; the black one where dropped.
        identity: the first references again, at about the target's area: [3, h, w] in -1..1 each.
        keeps_identity: whether they come out the same each time, so that latents can be cached.
        without_tokens: the reference tokens are left out.
        skipped: broken records that it stands in for, with the reason.
    """

    position: int
    record: str
    source: str
    target: torch.Tensor
    time_ids: tuple[int, ...]
    text: str
    references: tuple[Patches, ...]
    identity: tuple[torch.Tensor, ...] = ()
    keeps_identity: bool = True
    without_tokens: bool = False
    skipped: tuple[tuple[str, str], ...] = ()


class TrainingSamples(Dataset[Sample]):
    """Samples by position. A broken record is replaced by the next one and reported.

    Args:
        identity_references: see `make_sample`.
    """

    def __init__(
        self,
        records: Sequence[Record],
        settings: DataSettings,
        seed: int,
        identity_references: int = 0,
    ) -> None:
        self.records = records
        self._identity_references = identity_references
        self._settings = settings
        self._seed = seed
        self._damaged: dict[PictureSource, str] = {}

    def __getitem__(self, position: int) -> Sample:
        """
        Raises:
            EasyRefError: no record can be used.
        """
        skipped: list[tuple[str, str]] = []
        for attempt in range(len(self.records)):
            record = self.records[self._index(position, attempt)]
            try:
                sample = make_sample(
                    record,
                    self._settings,
                    self._seed,
                    position,
                    self._open,
                    self._identity_references,
                )
            except (EasyRefError, OSError, ValueError) as error:
                skipped.append((record.name, str(error)))
                continue
            return replace(sample, skipped=tuple(skipped))
        raise EasyRefError(
            f"None of the {len(skipped)} records can be used; of the first one tried, "
            f"{skipped[0][0]}: {skipped[0][1]} Check data.files and data.root."
        )

    @property
    def most_references(self) -> int:
        """References of the largest group, as far as they are used."""
        longest = max(len(record.references) for record in self.records)
        return max(1, min(longest, self._settings.max_references))

    def _open(self, source: PictureSource) -> Image.Image:
        """The image; one that cannot be decoded is remembered and not decoded again.

        Raises:
            EasyRefError: missing or broken.
        """
        if source in self._damaged:
            raise EasyRefError(self._damaged[source])
        try:
            return source.open()
        except EasyRefError as error:
            cause = error.__context__
            # Errors of the operating system may be temporary, and are cheap to try again.
            if not (isinstance(cause, OSError) and cause.errno is not None):
                self._damaged[source] = str(error)
            raise

    def _index(self, position: int, attempt: int) -> int:
        count = len(self.records)
        order = _permutation(count, self._seed, position // count)
        return order[(position + attempt) % count]


class SafeSamples(Dataset["Sample | EasyRefError"]):
    """`TrainingSamples` with errors as values: worker processes would turn them into tracebacks."""

    def __init__(self, samples: TrainingSamples) -> None:
        self._samples = samples

    def __getitem__(self, position: int) -> Sample | EasyRefError:
        try:
            return self._samples[position]
        except EasyRefError as error:
            return error


def raise_errors(samples: Sequence[Sample | EasyRefError]) -> list[Sample]:
    """
    Raises:
        EasyRefError: one of them is an error.
    """
    for sample in samples:
        if isinstance(sample, EasyRefError):
            raise sample
    return list(samples)


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    return torch.randperm(count, generator=generator).tolist()


def _mix(seed: int, number: int) -> int:
    """A seed; those of neighbouring numbers are far apart."""
    return (seed * 1_000_003 + number * 7_919 + 12_345) % (2**63 - 1)


def noise_generator(seed: int, position: int) -> torch.Generator:
    """Generator of a sample's noise and timestep, on the CPU so that all devices get the same."""
    return torch.Generator().manual_seed(_mix(seed + 1, position))


def noise_seed(seed: int, position: int) -> int:
    """Seed of the noise of a sample's identity references."""
    return _mix(seed + 2, position)


def make_sample(
    record: Record,
    settings: DataSettings,
    seed: int,
    position: int,
    opened: Callable[[PictureSource], Image.Image] = PictureSource.open,
    identity_references: int = 0,
) -> Sample:
    """Read and augment a record's images.

    Args:
        opened: reads an image.
        identity_references: how many references self-attention attends to, at most.

    Raises:
        EasyRefError: an image is missing or broken, or the record itself.
    """
    record.check()
    rng = random.Random(_mix(seed, position))
    picture = opened(record.target)
    text = rng.choice(record.texts) if record.texts else ""
    if record.face is not None:
        pictures = [face_crop(picture, record.face, rng)]
    else:
        pictures = [opened(source) for source in _chosen(record, settings, rng)]
    target, corner = _target(picture, settings, rng)
    if corner is not None and len(pictures) == 1 and record.face is None:
        # A single reference is cropped like its target (alignment: they are the same picture).
        pictures = [square_crop(pictures[0], settings.resolution, corner)]
    chance = rng.random()
    drop_image = chance < settings.drop_image
    drop_text = settings.drop_image <= chance < settings.drop_image + settings.drop_text
    both = settings.drop_image + settings.drop_text
    drop_both = both <= chance < both + settings.drop_both
    own = [] if drop_image or drop_both else pictures[:identity_references]
    chance = rng.random()
    if chance < settings.drop_identity:
        own = []
    without_tokens = 0 <= chance - settings.drop_identity < settings.drop_tokens
    if drop_image or drop_both:
        pictures = [black_picture()]
    return Sample(
        position,
        record.name,
        record.target.fingerprint(),
        _pixels(target.picture),
        target.time_ids,
        "" if drop_text or drop_both else text,
        tuple(preprocess(p, settings.image_size) for p in pictures),
        tuple(identity_pixels(p, math.prod(target.picture.size)) for p in own),
        keeps_identity=record.face is None,
        without_tokens=without_tokens,
    )


def _chosen(record: Record, settings: DataSettings, rng: random.Random) -> list[PictureSource]:
    """The references to use, in order."""
    chosen = choose_references(
        len(record.references), rng, settings.max_references, settings.subset_probability
    )
    return [record.references[n] for n in chosen]


def _target(
    picture: Image.Image, settings: DataSettings, rng: random.Random
) -> tuple[Target, tuple[int, int] | None]:
    """The target, and the (top, left) of its square unless it keeps its aspect ratio."""
    size = settings.resolution
    if settings.crop == "aspect":
        return aspect_target(picture, size), None
    corner = square_corner(picture, size, rng, settings.crop == "center")
    square = square_crop(picture, size, corner)
    return Target(square, (picture.height, picture.width), corner), corner


def identity_pixels(picture: Image.Image, area: int) -> torch.Tensor:
    """A reference at about this area in pixels, in its own aspect ratio: [3, h, w] in -1..1."""
    size = reference_size(*picture.size, area)
    return _pixels(picture.resize(size, Image.Resampling.LANCZOS))


def _pixels(picture: Image.Image) -> torch.Tensor:
    """[3, H, W] in -1..1"""
    import numpy as np

    levels = torch.from_numpy(np.array(picture, dtype=np.float32))
    return levels.permute(2, 0, 1) / 127.5 - 1


@dataclass(frozen=True)
class PositionSampler:
    """Batches of positions for one process; all processes' batches together are the global batch.

    Process p's batch a of optimiser step s holds positions
    s * G + (a * P + p) * B ... + B - 1, where G = P * A * B, so one process with accumulation gets
    the samples that several without it get.

    Attributes:
        batch, accumulation, processes, process: B, A, P, p.
        first, steps: optimiser steps from `first` up to `steps`.
    """

    batch: int
    accumulation: int
    processes: int
    process: int
    first: int
    steps: int

    def __len__(self) -> int:
        return (self.steps - self.first) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        # Batches of all processes are consecutive; each takes every `processes`-th of them.
        for index in range(self.first * self.accumulation, self.steps * self.accumulation):
            start = (index * self.processes + self.process) * self.batch
            yield list(range(start, start + self.batch))
