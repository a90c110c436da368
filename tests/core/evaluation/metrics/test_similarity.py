"""What is compared with what, and which columns apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from easyref_core.evaluation.groups import GroupPicture
from easyref_core.evaluation.metrics.embedders import DINO, PictureEmbedder, open_clip
from easyref_core.evaluation.metrics.similarity import SimilarityMetric, cosine
from easyref_core.evaluation.trials import Trial, Variant
from easyref_core.training.records import PictureSource

pytest.importorskip("transformers")


class Hue(PictureEmbedder):
    """Pictures of one colour: similarity is that of the colours."""

    kind = DINO

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.name, self.identity, self.seen = "hue", {"sha256": {}}, 0

    def picture(self, image: Image.Image) -> torch.Tensor:
        self.seen += 1
        colour = torch.tensor(image.getpixel((0, 0)), dtype=torch.float32)
        return torch.nn.functional.normalize(colour, dim=0)


RED, ORANGE, YELLOW, BLUE = (255, 0, 0), (255, 90, 0), (255, 255, 0), (0, 0, 255)


def colour(levels: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (8, 8), levels)


def likeness(first: tuple[int, int, int], second: tuple[int, int, int]) -> float:
    hue = Hue()
    return cosine(hue.picture(colour(first)), hue.picture(colour(second)))


@pytest.fixture
def trial(tmp_path: Path) -> Any:
    """A trial with pictures of these colours."""

    def save(levels: tuple[int, int, int]) -> GroupPicture:
        path = tmp_path / f"{'_'.join(map(str, levels))}.png"
        if not path.exists():
            colour(levels).save(path)
        return GroupPicture(PictureSource(path))

    def make(
        targets: list[tuple[int, int, int]],
        references: list[tuple[int, int, int]],
        prompt: str = "a ball",
    ) -> Trial:
        return Trial(
            variant=Variant("easyref"),
            label="easyref",
            path="images/easyref/a/0",
            group="a",
            split="",
            kind="",
            references=tuple(map(save, references)),
            targets=tuple(map(save, targets)),
            prompt=prompt,
            seed=0,
        )

    return make


def test_several_targets_give_the_mean(trial: Any) -> None:
    (found,) = SimilarityMetric(Hue()).score([trial([RED, YELLOW], [])], [colour(ORANGE)])
    mean = (likeness(ORANGE, RED) + likeness(ORANGE, YELLOW)) / 2
    assert found == {"dino_i": pytest.approx(mean)}


def test_a_copy_is_nearer_to_a_reference_than_references_to_each_other(trial: Any) -> None:
    given = trial([BLUE], [RED, YELLOW])
    copied, new = SimilarityMetric(Hue()).score([given, given], [colour(ORANGE), colour(BLUE)])
    assert copied["dino_nearest"] == pytest.approx(likeness(ORANGE, RED))
    assert copied["dino_nearest"] > likeness(RED, YELLOW) > new["dino_nearest"]
    assert (copied["dino_copied"], new["dino_copied"]) == (1.0, 0.0)
    assert copied["dino_i"] < new["dino_i"] == pytest.approx(1)


def test_with_one_reference_there_is_nothing_to_compare_a_copy_with(trial: Any) -> None:
    (found,) = SimilarityMetric(Hue()).score([trial([RED], [YELLOW])], [colour(ORANGE)])
    assert sorted(found) == ["dino_i", "dino_nearest"]


def test_columns_are_left_out_where_they_do_not_apply(trial: Any, clip: Path) -> None:
    metric = SimilarityMetric(open_clip(clip, "small"))
    trials = [trial([RED], [], " "), trial([], [], "a ball"), trial([], [YELLOW, BLUE], "")]
    found = metric.score(trials, [colour(ORANGE)] * 3)
    assert [sorted(scores) for scores in found] == [
        ["clip_i"],
        ["clip_t"],
        ["clip_copied", "clip_nearest"],
    ]
    names = [column.name for column in metric.columns]
    assert names == ["clip_i", "clip_t", "clip_nearest", "clip_copied"]


def test_every_picture_is_embedded_once(trial: Any) -> None:
    hue = Hue()
    metric = SimilarityMetric(hue)
    given = trial([RED], [YELLOW, BLUE])
    first = metric.score([given], [colour(ORANGE)])
    assert metric.score([given] * 3, [colour(ORANGE)] * 3) == first * 3
    assert hue.seen == 3 + 4


def test_a_picture_that_changed_is_embedded_again(trial: Any) -> None:
    metric = SimilarityMetric(Hue())
    given = trial([RED], [])
    path = given.targets[0].source.path
    before = metric.score([given], [colour(BLUE)])
    Image.new("RGB", (9, 9), BLUE).save(path)
    assert metric.score([given], [colour(BLUE)])[0]["dino_i"] > before[0]["dino_i"]


def test_a_mean_over_fewer_targets_is_no_score(trial: Any) -> None:
    given = trial([RED, BLUE], [YELLOW])
    given.targets[0].source.path.write_bytes(b"no picture")
    given.targets[1].source.path.unlink()
    (found,) = SimilarityMetric(Hue()).score([given], [colour(ORANGE)])
    assert sorted(found) == ["dino_nearest"]


def test_a_score_does_not_depend_on_what_is_scored_beside_it(clip: Path, trial: Any) -> None:
    """A resumed run must give the same digits."""
    trials = [trial([c], [RED, BLUE], f"ball {n}") for n, c in enumerate((RED, YELLOW, BLUE))]
    images = [colour(c) for c in (ORANGE, BLUE, YELLOW)]
    whole = SimilarityMetric(open_clip(clip, "small")).score(trials, images)
    apart = SimilarityMetric(open_clip(clip, "small"))
    assert [apart.score([trials[n]], [images[n]])[0] for n in (2, 0, 1)] == [
        whole[n] for n in (2, 0, 1)
    ]


def test_the_papers_and_torchmetrics_scales_are_named(clip: Path) -> None:
    metric = SimilarityMetric(open_clip(clip, "small"))
    columns = {column.name: column for column in metric.columns}
    assert all(columns[name].scale == "cosine" for name in ("clip_i", "clip_t"))
    assert dict(columns["clip_t"].printed) == {"2.5 x cosine": 2.5, "100 x cosine": 100}
    assert dict(columns["clip_i"].printed) == {"100 x cosine": 100}
