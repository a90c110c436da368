"""Files that are not what they should be are refused with a sentence that says what is wrong."""

from __future__ import annotations

import io
import os
import pickle
import random
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from safetensors.torch import save

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.errors import EasyRefError
from easyref_core.tokens.reference_tokens import load_tokens
from easyref_core.weight_file import open_weight_file


def test_missing_file(tmp_path: Path) -> None:
    with goldens.refused("There is no weight file", tmp_path / "nothing.safetensors"):
        load_checkpoint(tmp_path / "nothing.safetensors")
    with goldens.refused("is a folder", tmp_path):
        load_checkpoint(tmp_path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "locked"
    path.write_bytes(b"x")

    def locked(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", locked)
    with goldens.refused(path, "Permission denied"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n", "pointer"),
        (b"<!DOCTYPE html><html>not found</html>", "neither a safetensors nor a PyTorch file"),
        (b"{}", "neither a safetensors nor a PyTorch file"),
    ],
)
def test_content_that_is_no_weight_file(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for action in (load_checkpoint, load_tokens):
        with goldens.refused(path, said):
            action(path)


@pytest.mark.parametrize("kept", [20, 4000, -1, -5000])
def test_truncated_safetensors(tmp_path: Path, kept: int) -> None:
    """Cut off within the header, and within the data."""
    whole = goldens.ADAPTER.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[:kept])
    size = f"{path.stat().st_size:,} bytes"
    with goldens.refused(path, "not a whole safetensors file", size, "download it again"):
        load_checkpoint(path)


def samples() -> dict[str, bytes]:
    tensors = {"a": torch.ones(4, 4), "b": torch.zeros(3)}
    found = {"safetensors": save(tensors, {"key": "value"}), "pickle": pickle.dumps({"a": 1}, 2)}
    for name, zipped in (("zip", True), ("legacy", False)):
        file = io.BytesIO()
        torch.save({"module": tensors}, file, _use_new_zipfile_serialization=zipped)
        found[name] = file.getvalue()
    return found


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy", "pickle", "noise"])
def test_no_damage_gets_past_as_another_error(tmp_path: Path, kind: str) -> None:
    """Cut at many places, bytes changed at random: always refused in the project's own words."""
    generator = random.Random(0)
    path = tmp_path / "damaged"
    if kind == "noise":
        starts = (b"", b"\x80\x02", b"PK\x03\x04", b"\x28" + bytes(7) + b"{")
        damaged = [s + generator.randbytes(generator.randint(0, 99)) for s in starts * 40]
    else:
        good = samples()[kind]
        damaged = [good[:cut] for cut in range(0, len(good), max(1, len(good) // 60))]
        for _ in range(150):
            changed = bytearray(good)
            for _ in range(generator.randint(1, 8)):
                changed[generator.randrange(min(len(good), 600))] = generator.randrange(256)
            damaged.append(bytes(changed))
    for content in damaged:
        path.write_bytes(content)
        with goldens.refused(path):
            load_checkpoint(path)


class Malice:
    """Runs code when it is unpickled carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["plain", "zip", "legacy", "module", "metadata"])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, form: str) -> None:
    probe, path = tmp_path / "probe", tmp_path / "adapter.pt"
    malice: Any = Malice(probe)
    if form == "plain":
        path.write_bytes(pickle.dumps(malice))
    elif form == "module":
        torch.save({"module": {"a": torch.ones(1), "b": malice}}, path)
    elif form == "metadata":
        torch.save({"module": {"a": torch.ones(1)}, "arguments": malice}, path)
    else:
        torch.save(malice, path, _use_new_zipfile_serialization=form == "zip")
    pickle.loads(pickle.dumps(malice))
    assert probe.exists(), "the probe itself must work"
    probe.rmdir()
    for action in (load_checkpoint, load_tokens):
        with goldens.refused(path, "could run code", "not opened", "safetensors"):
            action(path)
    assert not probe.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_read_without_unpickling_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    """So that faults in PyTorch's own protection do not matter."""
    path = tmp_path / "adapter.pt"
    torch.save(goldens.adapter_tensors(), path, _use_new_zipfile_serialization=zipped)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    found = load_checkpoint(path)
    assert found.identity == load_checkpoint(goldens.ADAPTER).identity


def test_pickle_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "list.pt"
    torch.save([torch.ones(1)], path)
    with goldens.refused(path, "holds a list"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "models/checkpoints"),
        ("ip_adapter.1.to_k_ip.weight", "IP-Adapter"),
        ("image_proj.latents", "IP-Adapter"),
        ("lora_unet_down_blocks_1_attentions_0.lora_up.weight", "a LoRA (models/loras)"),
        ("visual.patch_embed.proj.weight", "chosen as the MLLM"),
        ("model.visual.patch_embed.proj.weight", "chosen as the MLLM"),
        ("model.layers.0.mlp.up_proj.weight", "a bare language model"),
        ("uncond", "saved reference tokens"),
        ("control_model.input_hint_block.0.weight", "a ControlNet"),
        ("decoder.conv_in.weight", "It holds 1 tensors, such as decoder.conv_in.weight"),
        ("conditioner.embedders.0.weight", "such as conditioner.embedders.0.weight"),
    ],
)
def test_foreign_file_is_called_by_its_name(tmp_path: Path, name: str, said: str) -> None:
    tensors = {name: torch.zeros(2)}
    if name == "uncond":
        tensors["cond"] = torch.zeros(2)
    path = goldens.write(tmp_path / "model.safetensors", tensors)
    with goldens.refused(path, "is not an EasyRef adapter", said, "zongzhuofan/EasyRef"):
        load_checkpoint(path)


def test_file_without_tensors(tmp_path: Path) -> None:
    with goldens.refused("It holds 0 tensors. An adapter holds"):
        load_checkpoint(goldens.write(tmp_path / "none.safetensors", {}))


def test_refusals_are_one_type() -> None:
    assert issubclass(EasyRefError, ValueError)
    with pytest.raises(EasyRefError):
        open_weight_file("nowhere")
