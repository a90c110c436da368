"""Pretrained parts of a model set, copied into a work folder and written back."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from easyref_core.demo_set import TRAINED_SET, read_stored_weights
from easyref_core.errors import EasyRefError
from easyref_core.training.base import load_base
from workshop.demo import train as demo_train
from workshop.demo.__main__ import main
from workshop.demo.evaluation.classifier import SHIPPED_CLASSIFIER
from workshop.demo.pretraining.assemble import assemble_parts, assemble_set
from workshop.demo.pretraining.pretrained import take_parts
from workshop.demo.tiny_mllm import write_mllm
from workshop.demo.train import PRETRAINED, is_done, train_part, write_set

WITHOUT_MLLM = [part for part in PRETRAINED if part != "mllm"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pretrained parts, none of them trained here."""
    folder = tmp_path_factory.mktemp("work")
    take_parts(TRAINED_SET, folder)
    write_mllm(folder / "mllm" / "model", 0)
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_parts_of_a_whole_set_are_copied_and_count_as_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(take_parts(TRAINED_SET, tmp_path)) == sorted(WITHOUT_MLLM)
    assert [part for part in PRETRAINED if is_done(tmp_path, part)] == WITHOUT_MLLM
    monkeypatch.setattr(demo_train, "_needed", lambda *_: pytest.fail("trained again"))
    for part in WITHOUT_MLLM:
        train_part(part, tmp_path, torch.device("cpu"))


def test_stages_train_on_a_copied_base(work: Path) -> None:
    base = load_base(work / "base" / "model")
    stored = read_stored_weights(TRAINED_SET / "unet" / "diffusion_pytorch_model.safetensors")
    loaded = base.unet.state_dict()
    assert all(torch.equal(loaded[name], weight.float()) for name, weight in stored.items())
    states, pooled = base.encode_text(["a red star creature", "on a beach by day"])
    assert (states[0] - states[1]).abs().max() > 0.1
    assert (pooled[0] - pooled[1]).abs().max() > 0.1


def test_copied_parts_are_written_unchanged(work: Path, tmp_path: Path) -> None:
    assemble_parts(work, WITHOUT_MLLM, tmp_path)
    written = _files(tmp_path)
    shipped = _files(TRAINED_SET) | {SHIPPED_CLASSIFIER.name: SHIPPED_CLASSIFIER.read_bytes()}
    assert json.loads(written.pop("pretrained.json")) == {"parts": WITHOUT_MLLM}
    weights = [name for name in written if name.endswith(".safetensors")]
    assert len(weights) == 6
    assert all(written[name] == shipped[name] for name in weights)


def test_the_mllms_weights_are_written_until_an_adapter_carries_them(
    work: Path, tmp_path: Path
) -> None:
    size, parts = write_set(work, tmp_path / "parts")
    assert parts == PRETRAINED
    assert size == sum(f.stat().st_size for f in (tmp_path / "parts").rglob("*.safetensors"))
    assert take_parts(tmp_path / "parts", tmp_path / "work")
    assert all(is_done(tmp_path / "work", part) for part in PRETRAINED)
    copied, stored = (_files(f / "mllm" / "model") for f in (tmp_path / "work", work))
    assert copied == stored
    assemble_set(work, TRAINED_SET / "easyref.safetensors", tmp_path / "parts")
    names = _files(tmp_path / "parts").keys()
    assert "set.json" in names
    assert not {"pretrained.json", "mllm/model.safetensors", "judge.safetensors"} & names


def test_copying_again_changes_nothing_and_resumes(tmp_path: Path) -> None:
    take_parts(TRAINED_SET, tmp_path)
    before = _files(tmp_path)
    (tmp_path / "base").rename(tmp_path / "base.unfinished")
    (tmp_path / "base.unfinished" / "taken.txt").unlink()
    (tmp_path / "base.unfinished" / "model" / "unet" / "config.json").write_bytes(b"half")
    take_parts(TRAINED_SET, tmp_path)
    assert _files(tmp_path) == before


def test_parts_of_two_trainings_are_not_mixed(tmp_path: Path) -> None:
    own = tmp_path / "controlnet" / "state.pt"
    own.parent.mkdir()
    own.write_bytes(b"begun")
    with pytest.raises(EasyRefError, match=r"controlnet exists.*choose another --folder"):
        take_parts(TRAINED_SET, tmp_path)
    assert _files(tmp_path) == {"controlnet/state.pt": b"begun"}


def test_a_folder_without_a_complete_set_is_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(EasyRefError, match=r"no trained model set.*`train --set`"):
        take_parts(tmp_path, tmp_path / "work")
    parts = tmp_path / "parts"
    assemble_parts(work, ["vae", "judge"], parts)
    (parts / "judge.safetensors").unlink()
    with pytest.raises(EasyRefError, match=r"lacks judge\.safetensors"):
        take_parts(parts, tmp_path / "work")
    (parts / "pretrained.json").write_text('["vae"]', encoding="utf-8")
    with pytest.raises(EasyRefError, match=r"no trained model set"):
        take_parts(parts, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_damaged_part_is_named_and_not_copied(tmp_path: Path) -> None:
    shutil.copytree(TRAINED_SET, tmp_path / "set")
    damaged = tmp_path / "set" / "text_encoders" / "clip_g" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(EasyRefError, match=r"part base of .* cannot be copied"):
        take_parts(tmp_path / "set", tmp_path / "work")
    assert not is_done(tmp_path / "work", "base")


def test_parts_do_not_replace_a_whole_set(work: Path, tmp_path: Path) -> None:
    assemble_set(work, TRAINED_SET / "easyref.safetensors", tmp_path / "set")
    before = _files(tmp_path / "set")
    with pytest.raises(EasyRefError, match=r"holds a whole model set.*only vae"):
        assemble_parts(work, ["vae"], tmp_path / "set")
    assert _files(tmp_path / "set") == before
    with pytest.raises(EasyRefError, match="nothing to write"):
        write_set(tmp_path / "empty", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_command_copies_parts_and_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", "--folder", str(tmp_path / "work"), "--pretrained", str(TRAINED_SET)]
    command += ["--only", "vae"]
    assert main([*command, "--set", str(tmp_path / "parts")]) == 0
    printed = capsys.readouterr()
    copied = ", ".join(WITHOUT_MLLM)
    assert f"from {TRAINED_SET}: {copied}" in printed.err
    assert f"MB): {copied}" in printed.out
    before = _files(tmp_path / "parts")
    for more, said in (
        (["--set", str(tmp_path / "parts")], "holds a model set.*--overwrite"),
        (["--set", str(tmp_path / "work"), "--overwrite"], "holds no model set"),
        (["--set", str(TRAINED_SET), "--overwrite"], "which is read"),
    ):
        assert main([*command, *more]) == 1
        assert re.search(said, capsys.readouterr().err)
    assert _files(tmp_path / "parts") == before
    assert main([*command, "--set", str(tmp_path / "parts"), "--overwrite"]) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command) == 1
    assert "leave --pretrained out" in capsys.readouterr().err
