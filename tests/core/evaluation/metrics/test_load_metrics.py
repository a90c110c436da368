"""Which metrics a run gets: models that are there, missing, of another kind or damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.metrics.embedders import open_clip, open_dino
from easyref_core.evaluation.metrics.load import load_metrics

pytest.importorskip("transformers")

Edit = Callable[[Path], object]


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda model: shutil.copytree(model, tmp_path / model.name)


def edit_json(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_all_metrics_with_what_they_are_computed_by(clip: Path, dinov2: Path) -> None:
    metrics, notes = load_metrics(str(clip), str(dinov2), offline=True)
    assert notes == []
    of_clip, of_dino = (metric.identity() for metric in metrics)
    assert json.loads(json.dumps([of_clip, of_dino])) == [of_clip, of_dino]
    weights = (clip / "model.safetensors").read_bytes()
    assert of_clip["sha256"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert (of_clip["metric"], of_clip["model"], of_clip["family"]) == ("clip", "clip", "clip")
    assert (of_clip["scale"], of_clip["tokens"]) == ("cosine", 77)
    assert of_clip["preprocessing"]["size"] == {"shortest_edge": 28}
    assert of_dino["preprocessing"]["image_processor_type"] == "BitImageProcessor"
    assert of_dino["family"] == "dinov2"


def test_the_same_directory_elsewhere_is_the_same_model(
    dinov2: Path, copied: Callable[[Path], Path]
) -> None:
    found = [load_metrics("", str(path))[0][0].identity() for path in (dinov2, copied(dinov2))]
    assert found[0] == found[1]


def test_a_missing_model_leaves_its_metric_out(dinov2: Path, tmp_path: Path) -> None:
    metrics, notes = load_metrics(str(tmp_path / "nothing"), str(dinov2))
    assert [metric.columns[0].name for metric in metrics] == ["dino_i"]
    assert len(notes) == 1
    for part in ("CLIP-I and CLIP-T are left out", "nothing", "openai/clip-vit-large-patch14"):
        assert part in notes[0]
    assert "--clip" in notes[0]
    (tmp_path / "empty").mkdir()
    metrics, notes = load_metrics("", str(tmp_path / "empty"))
    assert metrics == []
    assert "DINO-I is left out" in notes[0]
    assert "--dino" in notes[0]


def test_without_the_weights_a_model_is_missing(
    dinov2: Path, copied: Callable[[Path], Path]
) -> None:
    path = copied(dinov2)
    (path / "model.safetensors").unlink()
    metrics, notes = load_metrics("", str(path))
    assert metrics == []
    assert "no weights" in notes[0]


def test_a_model_of_another_kind_is_named(clip: Path, dinov2: Path, dino: Path) -> None:
    with pytest.raises(EasyRefError, match=r"--dino: .*type 'clip' where DINO is needed"):
        load_metrics(str(clip), str(clip))
    with pytest.raises(EasyRefError, match=r"--clip: .*type 'dinov2' where CLIP is needed"):
        load_metrics(str(dinov2), str(dino))
    with pytest.raises(EasyRefError, match=r"is a file; CLIP is a directory"):
        load_metrics(str(clip / "model.safetensors"), "")


def cut_off(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def poison(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(model / "model.safetensors")
    state["layernorm.weight"][3] = float("nan")
    save_file(state, model / "model.safetensors")


def lose_a_weight(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(model / "model.safetensors")
    state["spare"] = state.pop("layernorm.weight")
    save_file(state, model / "model.safetensors")


def config(**changed: Any) -> Edit:
    return lambda model: edit_json(model / "config.json", **changed)


def preprocessing(**changed: Any) -> Edit:
    return lambda model: edit_json(model / "preprocessor_config.json", **changed)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut_off, "model.safetensors"),
        (poison, "values that are not numbers"),
        (lose_a_weight, "lack layernorm.weight"),
        (lambda model: (model / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda model: (model / "config.json").write_text("[]"), "holds a list"),
        (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
        (config(hidden_size=2**20, num_attention_heads=2), "weights, the files hold"),
        (config(hidden_size="wide"), "cannot be built by its config.json"),
        (config(num_channels=1), "cannot be built"),
        (lambda model: (model / "preprocessor_config.json").unlink(), "no preprocessor_config"),
        (preprocessing(image_processor_type="Evil"), "names the image processor 'Evil'"),
        (preprocessing(size={"shortest_edge": 10**9}), "a side is 1000000000"),
        (preprocessing(size="large"), "a side is 'large'"),
        (preprocessing(image_mean=[0.5]), "preprocessor_config.json cannot be used"),
        (preprocessing(do_pad=True, pad_size={"height": 10**6, "width": 9}), "a side is 1000000"),
        (preprocessing(size={"shortest_edge": 32}, do_center_crop=False), "the shapes"),
        (preprocessing(do_resize=False, do_center_crop=False), "the shapes"),
        (config(patch_size=0), "patch_size is 0"),
        (config(patch_size=10**9), "patch_size is 1000000000"),
        (preprocessing(image_std=[0.0, 1.0, 1.0]), "not numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # numpy's, of divisions by zero
def test_a_damaged_model_is_refused_in_one_sentence(
    dinov2: Path, copied: Callable[[Path], Path], spoil: Edit, said: str
) -> None:
    path = copied(dinov2)
    spoil(path)
    with pytest.raises(EasyRefError) as refused:
        load_metrics("", str(path))
    assert said in str(refused.value)
    assert str(refused.value).startswith("--dino: ")
    assert "\n" not in str(refused.value)


def test_a_config_brings_no_code_and_no_other_arithmetic(
    dinov2: Path, copied: Callable[[Path], Path]
) -> None:
    path = copied(dinov2)
    expected = open_dino(dinov2, "x").picture(Image.new("RGB", (9, 9), (200, 10, 10)))
    edit_json(
        path / "config.json",
        attn_implementation="me/kernel-from-the-hub",
        _attn_implementation="me/kernel-from-the-hub",
        auto_map={"AutoModel": "evil.Model"},
        dtype="float16",
        torch_dtype="float16",
        output_hidden_states=True,
        return_dict=False,
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True},
    )
    edit_json(path / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.P"})
    found = open_dino(path, "x").picture(Image.new("RGB", (9, 9), (200, 10, 10)))
    assert torch.equal(found, expected)


def test_a_pickle_that_carries_code_is_not_run(
    dinov2: Path, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    path = copied(dinov2)
    (path / "model.safetensors").unlink()
    torch.save({"weight": Evil()}, path / "pytorch_model.bin")
    with pytest.raises(EasyRefError, match="more than tensors"):
        load_metrics("", str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(clip: Path, copied: Callable[[Path], Path]) -> None:
    path = copied(clip)
    for name in ("merges.txt", "model.safetensors", "config.json"):
        (path / name).unlink()
        os.mkfifo(path / name)
        if name == "merges.txt":
            with pytest.raises(EasyRefError, match=r"merges\.txt is a pipe"):
                load_metrics(str(path), "")
        else:
            metrics, notes = load_metrics(str(path), "")
            assert (metrics, len(notes)) == ([], 1)


def test_a_classifier_is_no_dino(dino: Path, copied: Callable[[Path], Path]) -> None:
    from safetensors.torch import load_file, save_file

    path = copied(dino)
    state = load_file(path / "model.safetensors")
    save_file(state | {"classifier.bias": torch.zeros(10)}, path / "model.safetensors")
    with pytest.raises(EasyRefError, match=r"hold beside it classifier\.bias"):
        load_metrics("", str(path))


def test_clip_needs_its_tokenizer(clip: Path, copied: Callable[[Path], Path]) -> None:
    path = copied(clip)
    vocabulary = json.loads((path / "vocab.json").read_text())
    (path / "vocab.json").write_text(json.dumps(vocabulary | {"more": len(vocabulary)}))
    with pytest.raises(EasyRefError, match="knows 514 tokens, its tokenizer 515"):
        load_metrics(str(path), "")
    (path / "vocab.json").unlink()
    with pytest.raises(EasyRefError, match="There is no tokenizer"):
        load_metrics(str(path), "")


def test_half_precision_and_pytorch_files_are_read(
    clip: Path, copied: Callable[[Path], Path]
) -> None:
    from safetensors.torch import load_file, save_file

    path = copied(clip)
    state = load_file(path / "model.safetensors")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
    expected = open_clip(clip, "x").picture(picture)
    (path / "model.safetensors").unlink()
    # Older files hold the position ids too.
    more = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    torch.save(state | more, path / "pytorch_model.bin")
    assert torch.equal(open_clip(path, "x").picture(picture), expected)
    save_file({name: w.half() for name, w in state.items()}, path / "model.safetensors")
    half = open_clip(path, "x").picture(picture)
    assert torch.allclose(half, expected, atol=2e-3)
    assert not torch.equal(half, expected)


class Hub:
    """Stands in for the Hugging Face hub."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        self.asked: list[tuple[str, bool]] = []
        self.answers: dict[str, Path | Exception] = {}
        self.cache: dict[str, Path] = {}
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def snapshot_download(
        self, repo_id: str, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        assert not any(pattern.endswith((".py", ".h5", "*")) for pattern in allow_patterns)
        self.asked.append((repo_id, local_files_only))
        answer = self.cache.get(repo_id) if local_files_only else self.answers.get(repo_id)
        if isinstance(answer, Path):
            return str(answer)
        raise answer or LocalEntryNotFoundError("nothing here")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


CLIP_NAME, DINO_NAME = "openai/clip-vit-large-patch14", "facebook/dinov2-small"


def test_models_come_from_the_hub_by_name(hub: Hub, clip: Path, dinov2: Path) -> None:
    hub.answers = {CLIP_NAME: clip, DINO_NAME: dinov2}
    metrics, notes = load_metrics()
    assert notes == []
    assert [metric.identity()["model"] for metric in metrics] == [CLIP_NAME, DINO_NAME]
    assert hub.asked == [(CLIP_NAME, False), (DINO_NAME, False)]


def test_offline_only_the_cache_is_asked(hub: Hub, dinov2: Path) -> None:
    hub.cache = {DINO_NAME: dinov2}
    metrics, notes = load_metrics(offline=True)
    assert len(metrics) == 1
    assert len(notes) == 1
    assert f"'{CLIP_NAME}' is not in the Hugging Face hub's cache" in notes[0]
    assert all(local for _, local in hub.asked)


@pytest.mark.parametrize("error", [None, ConnectionError("no route\nto host")])
def test_an_unreachable_hub_is_named_once(hub: Hub, dinov2: Path, error: Exception | None) -> None:
    hub.cache = {DINO_NAME: dinov2}
    if error:
        hub.answers = {CLIP_NAME: error, DINO_NAME: error}
    metrics, notes = load_metrics()
    assert len(metrics) == 1
    assert [("cannot be reached" in note, "left out" in note) for note in notes] == [
        (True, False),
        (False, True),
    ]
    assert [name for name, local in hub.asked if not local] == [CLIP_NAME]


def test_a_name_that_the_hub_does_not_have_is_missing(hub: Hub) -> None:
    import httpx
    from huggingface_hub.errors import RepositoryNotFoundError

    response = httpx.Response(404, request=httpx.Request("GET", "http://localhost"))
    hub.answers = {"me/nothing": RepositoryNotFoundError("404", response=response)}
    metrics, notes = load_metrics("me/nothing", "")
    assert metrics == []
    assert len(notes) == 1
    assert "has no model 'me/nothing'" in notes[0]


def test_dino_of_any_family_has_one_entry(dinov2: Path, dino: Path) -> None:
    picture = Image.new("RGB", (9, 9), (200, 10, 10))
    first, second = (open_dino(path, "x").picture(picture) for path in (dinov2, dino))
    assert first.shape == second.shape == (32,)
    assert not torch.allclose(first, second)
