"""A demo set in the layout of the trained one: few words, an MLLM inside the adapter, its size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyhost import Pack
from goldens import difference, write
from PIL import Image
from safetensors.torch import load_file, save_file

from easyref_core.demo_set import STORED_IDS, TABLE, whole_table
from workshop.demo.pretraining.words import used_ids
from workshop.demo.tiny import write_tiny_set

SIZE = 112
ENCODERS = ("clip_l", "clip_g")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text encoders with CLIP's whole tables, unknown words alike."""
    directory = write_tiny_set(tmp_path_factory.mktemp("whole"))
    for name in ENCODERS:
        path = directory / "text_encoders" / name / "model.safetensors"
        write(path, whole_table(cut_down(load_file(path))))
    return directory


@pytest.fixture(scope="module")
def shipped(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same set, as the trained one is shipped."""
    directory = tmp_path_factory.mktemp("shipped") / "set"
    shutil.copytree(whole, directory)
    for name in ENCODERS:
        path = directory / "text_encoders" / name / "model.safetensors"
        write(path, cut_down(load_file(path)))
    (directory / "mllm" / "model.safetensors").unlink()
    adapter = directory / "easyref.safetensors"
    save_file(load_file(adapter), adapter, {"format": "pt", "image_size": str(SIZE)})
    (directory / "set.json").write_text(json.dumps({"trained": True, "image_size": SIZE}))
    return directory


def cut_down(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of the words that captions use, then one for all others."""
    ids = used_ids()
    table = torch.cat((state[TABLE][ids], state[TABLE][1:2]))
    return {**state, TABLE: table, STORED_IDS: ids}


def test_a_cut_down_table_gives_the_conditioning_of_the_whole_one(
    pack: Pack, whole: Path, shipped: Path
) -> None:
    load = pack.part("nodes.host.demo_models").load_text_encoders
    few, all_words = load(shipped / "text_encoders"), load(whole / "text_encoders")
    found = {}
    for text in ("on a beach at night", "on a beach by day", "", "unheard of"):
        found[text], pooled = few.encode_from_tokens(few.tokenize(text), return_pooled=True)
        states, expected_pooled = all_words.encode_from_tokens(
            all_words.tokenize(text), return_pooled=True
        )
        assert torch.equal(found[text], states)
        assert torch.equal(pooled, expected_pooled)
    assert difference(found["on a beach at night"], found["on a beach by day"]) > 0.01
    file = Path("text_encoders", "clip_l", "model.safetensors")
    assert (shipped / file).stat().st_size < (whole / file).stat().st_size / 4


@pytest.fixture
def trained(pack: Pack, shipped: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The outputs of EasyRef Demo Models with the shipped set."""
    monkeypatch.setattr(pack.part("easyref_core.demo_set"), "TRAINED_SET", shipped)
    return pack.nodes["EasyRefDemoModels"].execute().result


def encode(pack: Pack, easyref: Any, image_size: int) -> torch.Tensor:
    reference = pack.part("easyref_core.encode.group").Reference
    group = tuple(reference(Image.new("RGB", (128, 128), c)) for c in ("teal", "orange"))
    found = pack.run("EasyRefEncode", easyref, "at sea", "easyref", image_size, references=group)
    return torch.cat((found.cond, found.uncond))


def test_the_mllm_comes_from_the_adapter_and_its_tokenizer_from_the_folder(
    pack: Pack, trained: Any, whole: Path
) -> None:
    easyref = trained[3]
    assert easyref.checkpoint.has_mllm
    found = encode(pack, easyref, SIZE)
    easyref_model = pack.part("nodes.link_types").EasyRefModel
    other = easyref_model.of(whole / "easyref.safetensors", whole / "mllm")
    assert torch.equal(found, encode(pack, other, SIZE))


def test_references_are_encoded_at_the_size_in_the_adapter(
    pack: Pack, trained: Any, demo_easyref: Any
) -> None:
    easyref = trained[3]
    assert easyref.checkpoint.image_size == SIZE
    assert torch.equal(encode(pack, easyref, 0), encode(pack, easyref, SIZE))
    assert difference(encode(pack, easyref, 0), encode(pack, easyref, 336)) > 1e-4
    size = demo_easyref.checkpoint.image_size
    assert torch.equal(encode(pack, demo_easyref, 0), encode(pack, demo_easyref, size))


@pytest.mark.parametrize("size", [28, 55])
def test_a_size_that_leaves_no_pixels_is_refused(pack: Pack, trained: Any, size: int) -> None:
    with pack.refused(f"image_size is {size}", "56", "or 0", f"({SIZE})"):
        encode(pack, trained[3], size)
    assert trained[3].encoder.patcher is None
