"""Records, augmentation, samples and their positions."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from easyref_core.errors import EasyRefError
from easyref_core.training.augment import (
    aspect_target,
    choose_references,
    face_crop,
    square_corner,
    square_crop,
)
from easyref_core.training.config import DataSettings
from easyref_core.training.preview import unpatch
from easyref_core.training.records import PictureSource, read_records
from easyref_core.training.samples import (
    PositionSampler,
    SafeSamples,
    TrainingSamples,
    make_sample,
    noise_generator,
)

PLAIN = DataSettings(
    ("x",), resolution=64, crop="center", image_size=56, drop_image=0, drop_text=0, drop_both=0
)


def write_json(path: Path, items: object) -> Path:
    path.write_text(json.dumps(items))
    return path


def test_json_records_in_the_official_layout(tmp_path: Path) -> None:
    file = write_json(
        tmp_path / "d.json",
        [
            {"image_file": "a.png", "text": "one", "target": "b.png"},
            {"image_file": ["a.png", "c.png"], "text": ["x", "y"], "target": "b.png"},
            {"face": [[[1, 2, 30, 40, 0.9]]], "text": [], "target": "b.png"},
            {"face": [[1, 2, 30, 40, 0.9]], "text": "z", "target": "b.png"},
        ],
    )
    records = read_records([file], tmp_path / "pictures")
    assert [len(r.references) for r in records] == [1, 2, 0, 0]
    assert records[1].texts == ("x", "y")
    assert records[2].face == records[3].face == (1, 2, 30, 40)
    assert records[0].target.path == tmp_path / "pictures" / "b.png"


@pytest.mark.parametrize(
    ("items", "sentence"),
    [
        ([], "no records"),
        ({}, "holds an object, not a list of records"),
        ([{"text": "a"}], r"None of the 1 records .* the first one, .*d.json\[0\], has no target"),
        ([{"target": None, "image_file": "a.png"}], "has no target"),
        ([{"target": "a.png"}], "has no reference"),
        ([{"target": "a.png", "image_file": [None]}], "something else than text as image_file"),
        ([{"target": "a.png", "image_file": "a.png", "text": {}}], "than text as text"),
        ([{"target": "a.png", "image_file": "a.png", "text": "half \ud83d"}], "is no Unicode"),
        ([{"target": "a.png", "face": [[1, 2]]}], "has a face that is not"),
        ([{"target": "a.png", "face": {}}], "has a face that is not"),
        (["a.png"], "has no target"),
    ],
)
def test_files_without_any_usable_record_are_refused(
    tmp_path: Path, items: object, sentence: str
) -> None:
    with pytest.raises(EasyRefError, match=sentence):
        read_records([write_json(tmp_path / "d.json", items)], tmp_path)


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_tar_shards_are_read_without_unpacking(tmp_path: Path) -> None:
    members = {f"0001.{n}.png": png(c) for n, c in ((0, "red"), (1, "blue"), (10, "black"))}
    members |= {"0001.json": b'{"text": ["hello"]}', "0001.target.png": png("green")}
    members |= {"0002.target.jpg": png("white"), "0002.0.png": png("gray")}
    records = read_records([write_shard(tmp_path / "s.tar", members)], tmp_path)
    assert len(records) == 2
    first = records[0]
    colours = [s.open().getpixel((0, 0)) for s in first.references]
    assert colours == [(255, 0, 0), (0, 0, 255), (0, 0, 0)]
    assert first.target.open().getpixel((0, 0)) == (0, 128, 0)
    assert first.texts == ("hello",)
    assert records[1].texts == ()


def test_unusable_records_of_shards_are_skipped_and_named(tmp_path: Path) -> None:
    members = {"README.txt": b"hello", "good.0.png": png("red"), "good.target.png": png("red")}
    members |= {"target.0.png": png("red"), "references.target.png": png("red")}
    for name, content in (("broken", b"{"), ("list", b"[]"), ("number", b'{"text": 3}')):
        members |= {f"{name}.0.png": png("red"), f"{name}.target.png": png("red")}
        members[f"{name}.json"] = content
    records = read_records([write_shard(tmp_path / "s.tar", members)], tmp_path)
    assert {r.name.rpartition("/")[2]: r.broken[:18] for r in records} == {
        "good": "",
        "target": "has no target",
        "references": "has no reference: ",
        "broken": "has JSON that cann",
        "list": "has JSON that is n",
        "number": "has something else",
    }
    samples = TrainingSamples(records, PLAIN, 0)
    found = [samples[position] for position in range(len(records))]
    assert {sample.record.rpartition("/")[2] for sample in found} == {"good"}
    skipped = {name: reason for sample in found for name, reason in sample.skipped}
    assert len(skipped) == 5
    assert f"it {records[1].broken}." in skipped.values()


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    plain = write_shard(tmp_path / "s.tar", {"1.0.png": png("red"), "1.target.png": png("red")})
    packed = tmp_path / "s.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(EasyRefError, match=r"s\.tar\.gz cannot be read.*must not be compressed"):
        read_records([packed], tmp_path)


def test_json_and_shards_give_the_same_samples(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / f"{name}.png").write_bytes(png(colour))
    items = [{"image_file": ["a.png"], "text": "t", "target": "b.png"}]
    members = {"1.0.png": png("red"), "1.target.png": png("blue"), "1.json": b'{"text": "t"}'}
    plain = read_records([write_json(tmp_path / "d.json", items)], tmp_path)[0]
    packed = read_records([write_shard(tmp_path / "s.tar", members)], tmp_path)[0]
    first, second = (make_sample(r, PLAIN, 0, 5) for r in (plain, packed))
    assert torch.equal(first.target, second.target)
    assert torch.equal(first.references[0].pixels, second.references[0].pixels)
    assert first.text == second.text == "t"


@pytest.fixture
def groups(tmp_path: Path) -> TrainingSamples:
    items = []
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(png("red"))
        items.append({"image_file": [f"{number}.png"], "text": "t", "target": f"{number}.png"})
    (tmp_path / "2.png").write_bytes(b"broken")
    items[3]["target"] = "gone.png"
    records = read_records([write_json(tmp_path / "d.json", items)], tmp_path)
    return TrainingSamples(records, PLAIN, seed=1)


def test_broken_records_are_replaced_and_named(groups: TrainingSamples) -> None:
    samples = [groups[position] for position in range(10)]
    skipped = {name.rpartition("[")[2] for s in samples for name, _ in s.skipped}
    assert skipped == {"2]", "3]"}
    assert all("[2]" not in s.record and "[3]" not in s.record for s in samples)
    reasons = {reason for s in samples for _, reason in s.skipped}
    assert any("gone.png" in reason for reason in reasons)


def test_all_records_broken_is_refused(tmp_path: Path) -> None:
    items = [{"image_file": "no.png", "text": "", "target": "no.png"}]
    records = read_records([write_json(tmp_path / "d.json", items)], tmp_path)
    with pytest.raises(EasyRefError, match=r"None of the 1 records .* no picture .*no\.png"):
        TrainingSamples(records, PLAIN, 0)[0]
    assert isinstance(SafeSamples(TrainingSamples(records, PLAIN, 0))[0], EasyRefError)


def test_one_usable_record_among_many_broken_ones_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good.png").write_bytes(png("red"))
    for number in range(150):
        (tmp_path / f"{number}.png").write_bytes(b"broken")
    names = [f"{number}.png" for number in range(150)]
    names[70] = "good.png"
    items = [{"image_file": [n], "text": "", "target": n} for n in names]
    records = read_records([write_json(tmp_path / "d.json", items)], tmp_path)
    decoded: list[str] = []

    def spy(source: PictureSource) -> Image.Image:
        decoded.append(source.path.name)
        return open_source(source)

    open_source = PictureSource.open
    monkeypatch.setattr(PictureSource, "open", spy)
    samples = TrainingSamples(records, PLAIN, seed=1)
    found = [samples[position] for position in range(300)]
    assert {sample.record.rpartition("[")[2] for sample in found} == {"70]"}
    bad = [name for name in decoded if name != "good.png"]
    assert len(bad) == len(set(bad)) == 149
    # Samples that have not met the broken ones before are the same.
    for position in (0, 299):
        fresh = TrainingSamples(records, PLAIN, seed=1)[position]
        assert fresh.skipped == found[position].skipped


def test_an_image_that_was_missing_for_a_while_is_read_again(tmp_path: Path) -> None:
    items = [{"image_file": [n], "text": "", "target": n} for n in ("a.png", "b.png")]
    (tmp_path / "b.png").write_bytes(png("red"))
    records = read_records([write_json(tmp_path / "d.json", items)], tmp_path)
    samples = TrainingSamples(records, PLAIN, seed=1)
    assert {samples[position].record[-3:] for position in range(2)} == {"[1]"}
    (tmp_path / "a.png").write_bytes(png("red"))
    assert {samples[position].record[-3:] for position in range(2)} == {"[0]", "[1]"}


@pytest.mark.parametrize("crop", ["center", "random", "aspect"])
def test_elongated_targets_are_skipped_and_named(tmp_path: Path, crop: str) -> None:
    Image.new("RGB", (1, 300), "red").save(tmp_path / "line.png")
    (tmp_path / "good.png").write_bytes(png("red"))
    items = [
        {"image_file": ["good.png"], "text": "", "target": f"{n}.png"} for n in ("line", "good")
    ]
    records = read_records([write_json(tmp_path / "d.json", items)], tmp_path)
    samples = TrainingSamples(records, replace(PLAIN, crop=crop), seed=1)
    found = [samples[position] for position in range(2)]
    assert {sample.record[-3:] for sample in found} == {"[1]"}
    ((name, reason),) = {pair for sample in found for pair in sample.skipped}
    assert name.endswith("[0]")
    assert "1x300, an aspect ratio of 300; the most that is trained on is 50" in reason


def test_an_epoch_has_each_record_once(tmp_path: Path) -> None:
    items = []
    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes(png("red"))
        items.append({"image_file": f"{number}.png", "text": "", "target": f"{number}.png"})
    records = read_records([write_json(tmp_path / "d.json", items)], tmp_path)
    samples = TrainingSamples(records, PLAIN, seed=4)
    for epoch in range(3):
        names = [samples[7 * epoch + n].record for n in range(7)]
        assert len(set(names)) == 7
    assert [samples[n].record for n in range(7)] != [samples[7 + n].record for n in range(7)]


def test_a_sample_depends_on_seed_and_position_alone(groups: TrainingSamples) -> None:
    settings = replace(PLAIN, crop="random", drop_image=0.3, drop_text=0.3)
    varied = TrainingSamples(groups.records, settings, seed=1)
    one, again = varied[8], varied[8]
    assert torch.equal(one.target, again.target)
    assert one.text == again.text
    noises = [torch.randn(4, generator=noise_generator(1, n)) for n in (8, 8, 9)]
    assert torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[0], noises[2])


def test_processes_together_take_the_positions_of_one() -> None:
    one = [p for batch in PositionSampler(3, 4, 1, 0, 0, 5) for p in batch]
    many = [
        [p for batch in PositionSampler(3, 2, 2, process, 0, 5) for p in batch]
        for process in (0, 1)
    ]
    assert sorted(one) == sorted(many[0] + many[1]) == list(range(60))
    for step in range(5):
        whole = set(one[12 * step : 12 * step + 12])
        assert whole == {*many[0][6 * step : 6 * step + 6], *many[1][6 * step : 6 * step + 6]}


def test_positions_resume_at_any_step() -> None:
    whole = list(PositionSampler(2, 3, 2, 1, 0, 6))
    assert list(PositionSampler(2, 3, 2, 1, 4, 6)) == whole[12:]


@pytest.mark.parametrize("share", ["drop_image", "drop_text", "drop_both"])
def test_dropping_gives_the_black_image_or_no_text(groups: TrainingSamples, share: str) -> None:
    sample = TrainingSamples(groups.records, replace(PLAIN, **{share: 1.0}), 1)[0]
    black = unpatch(sample.references[0]).getextrema() == ((0, 0),) * 3
    assert black == (share != "drop_text")
    assert (sample.text == "") == (share != "drop_image")


def test_drop_probabilities_are_observed(groups: TrainingSamples) -> None:
    settings = replace(PLAIN, drop_image=0.2, drop_text=0.3, drop_both=0.1)
    samples = TrainingSamples(groups.records, settings, 1)
    texts = sum(samples[n].text == "" for n in range(300)) / 300
    assert 0.3 < texts < 0.5


@pytest.mark.parametrize("size", [(1024, 1024), (2000, 1000), (700, 1400), (333, 900), (64, 64)])
def test_aspect_targets_are_multiples_of_64(size: tuple[int, int]) -> None:
    target = aspect_target(Image.new("RGB", size), 512)
    assert target.picture.width % 64 == target.picture.height % 64 == 0
    assert 0.6 < target.picture.width * target.picture.height / 512**2 < 1.6
    assert target.time_ids[2:4] == (0, 0)


def test_single_reference_is_cropped_like_its_target(tmp_path: Path) -> None:
    picture = Image.linear_gradient("L").resize((200, 100)).convert("RGB")
    picture.save(tmp_path / "a.png")
    items = [{"image_file": "a.png", "text": "", "target": "a.png"}]
    record = read_records([write_json(tmp_path / "d.json", items)], tmp_path)[0]
    settings = replace(PLAIN, crop="random", image_size=84)
    sample = make_sample(record, settings, 3, 11)
    target = Image.fromarray(
        ((sample.target.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    )
    reference = unpatch(sample.references[0]).resize(target.size)
    difference = torch.tensor(list(target.convert("L").getdata())).float()
    difference -= torch.tensor(list(reference.convert("L").getdata())).float()
    assert difference.abs().mean() < 4


def test_square_crops_stay_inside() -> None:
    rng = random.Random(0)
    for size in ((50, 300), (300, 50), (64, 64), (65, 1000)):
        picture = Image.new("RGB", size)
        for _ in range(20):
            corner = square_corner(picture, 64, rng, centred=False)
            assert min(corner) >= 0
            assert square_crop(picture, 64, corner).size == (64, 64)


def test_face_crops_are_square_and_inside() -> None:
    rng = random.Random(0)
    picture = Image.new("RGB", (120, 90))
    for box in ((0, 0, 20, 30), (100, 70, 119, 89), (-5, -5, 500, 500), (60, 40, 60, 40)):
        crop = face_crop(picture, box, rng)
        assert abs(crop.width - crop.height) <= 1
        assert max(crop.size) <= 90


def test_references_are_shuffled_limited_and_subsampled() -> None:
    rng = random.Random(0)
    orders = [choose_references(6, rng, 4, 0.5) for _ in range(200)]
    assert {len(o) for o in orders} == {2, 3, 4}
    assert all(len(set(o)) == len(o) for o in orders)
    assert len({o[0] for o in orders}) == 6
    assert all(len(choose_references(2, rng, 28, 1.0)) == 2 for _ in range(10))


def test_unpatching_restores_the_mllms_image(tmp_path: Path) -> None:
    from easyref_core.pictures.preprocessing import preprocess

    picture = Image.linear_gradient("L").convert("RGB")
    seen = unpatch(preprocess(picture, 84))
    again = unpatch(preprocess(seen, 84))
    assert seen.size == again.size
    assert seen.tobytes() == again.tobytes()
