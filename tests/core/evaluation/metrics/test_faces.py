"""Face identity: with random weights, and with real ones on real faces where they can be had."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path

import pytest
import torch
from face_model_folder import write_face_model
from PIL import Image, ImageEnhance, ImageOps

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.groups import GroupPicture
from easyref_core.evaluation.metrics.faces import SAME_PERSON, FaceIdentity, FaceModel
from easyref_core.evaluation.trials import Trial, Variant
from easyref_core.training.records import PictureSource

PACKAGE = Path(sys.prefix, "face-models", "package")
real = pytest.mark.skipif(
    not (PACKAGE / "model").is_dir(), reason="no weights of face-api; `make test` fetches them"
)


def trial(*targets: Path) -> Trial:
    pictures = tuple(GroupPicture(PictureSource(path)) for path in targets)
    return Trial(Variant("none"), "none", "images/0", "g", "", "", (), pictures, "", 0)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_face_model(tmp_path_factory.mktemp("faces") / "model")


@pytest.fixture
def told(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> FaceIdentity:
    """The metric with descriptors that pictures' first pixel tells: none for black."""

    def embed_face(self: FaceModel, picture: Image.Image) -> torch.Tensor | None:
        red = picture.getpixel((0, 0))[0]
        return torch.tensor([red / 100.0, 0.0]) if red else None

    monkeypatch.setattr(FaceModel, "embed_face", embed_face)
    return FaceIdentity(random_model)


def picture(red: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (red, 0, 0))


def saved(red: int, folder: Path) -> Path:
    path = folder / f"{red}.png"
    picture(red).save(path)
    return path


def test_distances_to_the_targets_are_averaged(told: FaceIdentity, tmp_path: Path) -> None:
    targets = [saved(red, tmp_path) for red in (100, 250, 0)]
    [scores] = told.score([trial(*targets)], [picture(150)])
    assert scores == pytest.approx({"face_found": 1, "face_same": 0.5, "face_distance": 0.75})
    assert scores.keys() == {column.name for column in told.columns}


def test_an_image_without_a_face_is_counted_and_has_no_distance(
    told: FaceIdentity, tmp_path: Path
) -> None:
    [scores] = told.score([trial(saved(100, tmp_path))], [picture(0)])
    assert scores == {"face_found": 0, "face_same": 0}


def test_targets_without_a_face_are_not_scored(told: FaceIdentity, tmp_path: Path) -> None:
    assert told.score([trial(saved(0, tmp_path)), trial()], [picture(100)] * 2) == [{}, {}]


def test_a_target_that_cannot_be_read_is_named(told: FaceIdentity, tmp_path: Path) -> None:
    with pytest.raises(EasyRefError, match=r"gone\.png"):
        told.score([trial(tmp_path / "gone.png")], [picture(100)])


def test_the_identity_holds_no_path(random_model: Path, tmp_path: Path) -> None:
    elsewhere = write_face_model(tmp_path / "copy")
    assert FaceIdentity(random_model).identity() == FaceIdentity(elsewhere).identity()
    path = elsewhere / "face_recognition_model.bin"
    path.write_bytes(path.read_bytes()[::-1])
    assert FaceIdentity(random_model).identity() != FaceIdentity(elsewhere).identity()


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (9000, 3), (65, 64)])
def test_pictures_of_every_shape_are_looked_at(random_model: Path, size: tuple[int, int]) -> None:
    model = FaceModel(random_model)
    # Random weights see a face in every cell.
    model._detector.conv8.bias.data.fill_(3.0)
    descriptor = model.embed_face(Image.new("RGB", size, (200, 90, 80)))
    assert descriptor is None or descriptor.shape == (128,)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1e38, 1e38])
@pytest.mark.parametrize("network", ["_detector", "_landmarks"])
def test_networks_that_overflow_find_no_face(
    random_model: Path, network: str, value: float
) -> None:
    model = FaceModel(random_model)
    model._detector.conv8.bias.data.fill_(3.0)
    last = {"_detector": "conv8", "_landmarks": "fc"}[network]
    getattr(getattr(model, network), last).bias.data.fill_(value)
    model.embed_face(Image.new("RGB", (64, 64), "gray"))


@pytest.fixture(scope="module")
def model() -> FaceModel:
    return FaceModel(PACKAGE / "model")


@pytest.fixture(scope="module")
def hopper() -> Image.Image:
    """Grace Hopper, a photograph in the public domain."""
    cbook = pytest.importorskip("matplotlib.cbook")
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return Image.open(file).convert("RGB")


def distance(model: FaceModel, first: Image.Image, second: Image.Image) -> float:
    embeddings = [model.embed_face(picture) for picture in (first, second)]
    assert all(embedding is not None for embedding in embeddings)
    return float((embeddings[0] - embeddings[1]).norm())


@real
def test_face_and_descriptor_are_those_of_face_api(model: FaceModel, hopper: Image.Image) -> None:
    # Of face-api 1.7.15 in node, on TensorFlow.js.
    [box] = model.find(hopper)
    found = (box.x, box.y, box.width, box.height)
    assert found == pytest.approx((141.6233, 139.5032, 242.7144, 209.7904), abs=0.01)
    assert box.score == pytest.approx(0.914964, abs=1e-4)
    first = (-0.05631, 0.0205, 0.06468, 0.05333, -0.08219, -0.0451, -0.01654, -0.16875)
    assert model.embed_face(hopper)[:8].tolist() == pytest.approx(first, abs=1e-3)


@real
@pytest.mark.parametrize("change", ["flip", "crop", "bright", "dark", "jpeg", "small", "large"])
def test_a_changed_photograph_shows_the_same_person(
    model: FaceModel, hopper: Image.Image, change: str
) -> None:
    width, height = hopper.size
    stored = BytesIO()
    hopper.save(stored, "JPEG", quality=40)
    changed = {
        "flip": lambda: ImageOps.mirror(hopper),
        "crop": lambda: hopper.crop((width // 8, 40, width, height * 3 // 4)),
        "bright": lambda: ImageEnhance.Brightness(hopper).enhance(1.3),
        "dark": lambda: ImageEnhance.Brightness(hopper).enhance(0.7),
        "jpeg": lambda: Image.open(stored).convert("RGB"),
        "small": lambda: hopper.resize((width // 2, height // 2)),
        "large": lambda: hopper.resize((width * 2, height * 2)),
    }[change]()
    assert distance(model, hopper, changed) < 0.4 < SAME_PERSON


@real
@pytest.mark.parametrize("sample", [1, 2, 5])
def test_another_person_is_far(model: FaceModel, hopper: Image.Image, sample: int) -> None:
    other = Image.open(PACKAGE / "demo" / f"sample{sample}.jpg").convert("RGB")
    assert distance(model, hopper, other) > SAME_PERSON


@real
def test_drawings_and_landscapes_show_no_face(model: FaceModel) -> None:
    assert model.embed_face(Image.radial_gradient("L").convert("RGB")) is None
    assert model.embed_face(Image.effect_noise((256, 256), 60).convert("RGB")) is None


@real
def test_the_metric_tells_people_apart(hopper: Image.Image, tmp_path: Path) -> None:
    hopper.save(tmp_path / "hopper.png")
    metric = FaceIdentity(PACKAGE / "model")
    images = [ImageOps.mirror(hopper), Image.open(PACKAGE / "demo/sample2.jpg").convert("RGB")]
    same, other = metric.score([trial(tmp_path / "hopper.png")] * 2, images)
    assert same["face_same"] == 1
    assert other["face_same"] == 0
    assert same["face_distance"] < other["face_distance"] - 0.2
