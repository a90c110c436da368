"""Groups that are composed for each step of the MLLM's training."""

from __future__ import annotations

import random
from dataclasses import asdict

import pytest
import torch
from PIL import Image

from easyref_core.pictures.preprocessing import picture_levels
from workshop.demo.dataset.characters import Identity, draw_character
from workshop.demo.dataset.groups import draw_identity, strange
from workshop.demo.dataset.poses import Pose
from workshop.demo.pretraining import composed
from workshop.demo.pretraining.composed import Composer, place

CHARACTER = Identity("star", "red", "dots", "goggle", "crown")
FRIENDS = [
    Identity("round", "blue", "plain", "sleepy", "bow"),
    Identity("square", "green", "stripes", "single", "scarf"),
    Identity("flower", "pink", "belly", "beady", "top hat"),
    Identity("drop", "teal", "plain", "sleepy", "antennae"),
]
ALIKE = Identity("star", "red", "dots", "goggle", "bow")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[list[Identity]]:
    """Collects the identities in each image, from back to front."""
    found: list[list[Identity]] = []
    real = composed._compose

    def compose(rng, layers):
        found.extend([identity for identity, _ in of_image] for of_image in layers)
        return real(rng, layers)

    monkeypatch.setattr(composed, "_compose", compose)
    return found


def test_composed_figures_are_placed_as_drawn_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    pose = Pose(0.36, 0.58, 0.8, 15.0)
    monkeypatch.setattr("workshop.demo.dataset.groups.alone", lambda rng: pose)
    white = Image.new("RGB", (112, 112), (255, 255, 255))
    monkeypatch.setattr("workshop.demo.dataset.groups.draw_scene", lambda *_: white.copy())
    drawn = draw_identity(CHARACTER, 112, random.Random(0)).picture
    figure = picture_levels(draw_character(CHARACTER, 96))
    placed = place(figure[None], [pose], 112)[0]
    on_white = placed[:3] + 255 - placed[3:]
    wanted = picture_levels(drawn).float()
    apart = (on_white - wanted).abs().mean()
    moved = (on_white.roll(3, dims=2) - wanted).abs().mean()
    assert apart < 4  # resampled differently
    assert apart < moved / 2


def test_crowded_groups_show_the_character_beside_different_strangers(
    shown: list[list[Identity]],
) -> None:
    composer = Composer([CHARACTER, ALIKE, *FRIENDS])
    levels, facts = composer.groups(random.Random(1), 30, 3)
    assert levels.shape == (90, 3, 112, 112)
    assert levels.dtype == torch.uint8
    crowds = 0
    for number, of_group in enumerate(facts):
        images = shown[number * 3 : number * 3 + 3]
        character = Identity(**of_group)
        assert all(character in image for image in images)
        friends = [figure for image in images for figure in image if figure != character]
        assert all(strange(friend, character) for friend in friends)
        if friends:
            crowds += 1
            assert len(set(friends)) == len(friends) == 3
            assert len({image.index(character) for image in images}) == 1  # bigger, or never
    assert 10 <= crowds < 30


def test_single_images_are_never_crowded(shown: list[list[Identity]]) -> None:
    Composer([CHARACTER, *FRIENDS]).groups(random.Random(0), 20, 1)
    assert [len(image) for image in shown] == [1] * 20


def test_the_same_seed_gives_the_same_images() -> None:
    composer = Composer([CHARACTER, *FRIENDS])
    one, facts = composer.groups(random.Random(5), 4, 2)
    other, again = composer.groups(random.Random(5), 4, 2)
    assert torch.equal(one, other)
    assert facts == again
    assert all(of_group in [asdict(i) for i in (CHARACTER, *FRIENDS)] for of_group in facts)
    assert not torch.equal(one, composer.groups(random.Random(6), 4, 2)[0])
