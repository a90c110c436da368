"""The judge learns attributes from drawn pictures and survives its file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("diffusers")

from easyref_core.errors import EasyRefError
from easyref_core.pictures.preprocessing import picture_levels
from workshop.demo.dataset.characters import ATTRIBUTES, COLOURS, Identity
from workshop.demo.dataset.groups import Drawn, Style, draw_identity, draw_style
from workshop.demo.judging.judge import (
    PALETTE,
    VALUES,
    Judge,
    load_judge,
    read_pictures,
    save_judge,
    train_judge,
    wanted,
    worsen,
)
from workshop.demo.pretraining.pictures import DrawnPictures
from workshop.demo.pretraining.steps import Schedule

CPU = torch.device("cpu")
STRIPED = Style("stripes", "blue", "pink", "yellow")


def in_memory(drawn: Sequence[Drawn]) -> DrawnPictures:
    pixels = torch.stack([picture_levels(one.picture) for one in drawn])
    names = [str(number) for number in range(len(drawn))]
    return DrawnPictures(names, pixels, [[one.caption] for one in drawn], [d.facts for d in drawn])


def red_and_blue(count: int, seed: int) -> DrawnPictures:
    rng = random.Random(seed)
    identities = [Identity("round", c, "plain", "beady", "bow") for c in ("red", "blue")]
    return in_memory([draw_identity(identities[n % 2], 128, rng) for n in range(count)])


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.manual_seed(0)
    return Judge().eval()


def test_it_learns_two_colours(tmp_path: Path) -> None:
    schedule = Schedule(25, 16, 3e-3, warmup=3, ema=0.8)
    trained = load_judge(train_judge(red_and_blue(24, 0), schedule, tmp_path, CPU))
    unseen = red_and_blue(20, 1)
    right = trained.right(unseen.pixels, unseen.facts)
    assert sum(right["colour"]) >= 18
    swapped = [facts | {"colour": "green"} for facts in unseen.facts]
    assert sum(trained.right(unseen.pixels, swapped)["colour"]) <= 2


def test_its_file_gives_the_same_answers(tmp_path: Path, judge: Judge) -> None:
    pixels = red_and_blue(4, 2).pixels
    path = tmp_path / "judge.safetensors"
    save_judge(judge, path)
    assert path.stat().st_size < 1e6
    before, after = judge.probabilities(pixels), load_judge(path).probabilities(pixels)
    assert before.keys() == after.keys()
    for head, shares in before.items():
        assert shares.shape == (4, len(VALUES[head]))
        assert (shares - after[head]).abs().max() < 5e-3


def test_a_file_that_is_no_judge_is_refused(tmp_path: Path, judge: Judge) -> None:
    path = tmp_path / "judge.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(EasyRefError, match="does not hold a demo judge"):
        load_judge(path)
    with pytest.raises(EasyRefError, match="no weight file"):
        load_judge(tmp_path / "absent.safetensors")


def test_a_judge_of_other_values_is_refused(
    tmp_path: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "judge.safetensors"
    save_judge(judge, path)
    monkeypatch.setitem(VALUES, "time", ("day", "night", "sunset"))
    with pytest.raises(EasyRefError, match="other attributes or values"):
        load_judge(path)


def test_each_kind_of_picture_has_its_own_questions(judge: Judge) -> None:
    rng = random.Random(0)
    character = draw_identity(Identity("star", "red", "dots", "goggle", "crown"), 128, rng)
    style = draw_style(STRIPED, "star", 128, rng)
    assert set(wanted(character.facts)) == {*ATTRIBUTES, "place", "time"}
    names = ("shape", "pattern", "first", "second", "ground")
    assert wanted(style.facts) == {f"style {name}": style.facts[name] for name in names}
    mixed = in_memory([character, style, character])
    counts = {head: len(flags) for head, flags in judge.right(mixed.pixels, mixed.facts).items()}
    assert counts == {head: 1 if head.startswith("style ") else 2 for head in (*VALUES, PALETTE)}


def test_two_colours_are_read_in_any_order_where_both_look_alike(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {head: torch.zeros(1, len(values)) for head, values in VALUES.items()}
    # Torn between two colours for both, as in checks: each alone could be read twice.
    for head, sure in (("style first", (0.6, 0.4)), ("style second", (0.55, 0.45))):
        rows[head][0, [COLOURS.index("red"), COLOURS.index("blue")]] = torch.tensor(sure)
    monkeypatch.setattr(judge, "probabilities", lambda pixels: rows)
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)

    def read(first: str, second: str, pattern: str) -> tuple[float, list[str]]:
        facts = {"first": first, "second": second, "ground": "red", "pattern": pattern}
        readings = read_pictures(judge, [Image.new("RGB", (8, 8))], facts)[0]
        return judge.right(pixels, [facts])[PALETTE][0], [reading.seen for reading in readings[:2]]

    for pattern in ("checks", "stripes"):
        assert read("red", "blue", pattern) == (1, ["red", "blue"])
        assert read("blue", "red", pattern) == (1, ["blue", "red"])
        assert read("pink", "red", pattern) == (0.5, ["blue", "red"])
        assert read("blue", "pink", pattern) == (0.5, ["blue", "red"])
        assert read("pink", "teal", pattern)[0] == 0
    for pattern in ("dots", "rings"):
        assert read("red", "blue", pattern) == (0.5, ["red", "red"])
        assert read("blue", "red", pattern) == (0.5, ["red", "red"])
        assert read("blue", "pink", pattern)[0] == 0
    assert judge.right(pixels, [{"ground": "red"}]).keys() == {"style ground"}


def test_what_it_reads_in_pictures_of_any_size(judge: Judge) -> None:
    rng = random.Random(0)
    style = draw_style(STRIPED, "star", 128, rng)
    pictures = [style.picture, style.picture.resize((200, 200)), style.picture.resize((64, 64))]
    rows = read_pictures(judge, pictures, style.facts)
    assert [[r.attribute for r in row] for row in rows] == [list(style.facts)] * 3
    for reading in (reading for row in rows for reading in row):
        assert reading.wanted == style.facts[reading.attribute]
        assert reading.right == (reading.seen == reading.wanted)
    only = read_pictures(judge, pictures[:1], {"colour": "red"})
    assert [reading.attribute for reading in only[0]] == ["colour"]


def test_pictures_are_worsened_each_in_its_own_way_and_alike_by_seed() -> None:
    pixels = red_and_blue(1, 3).batch(torch.tensor([0, 0, 0]))

    def made(seed: int) -> torch.Tensor:
        return worsen(pixels, torch.Generator().manual_seed(seed))

    first = made(0)
    assert torch.equal(first, made(0))
    assert not torch.equal(first, made(1))
    assert not torch.equal(first[0], first[1])
    assert first.shape == pixels.shape
    assert (first - pixels).abs().mean() < 0.5
