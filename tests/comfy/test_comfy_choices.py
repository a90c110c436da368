"""What can be chosen at the Loader, what is refused before a run, and what is looked at anew."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
from comfyhost import ADAPTER_ONLY, GOLDEN, GOLDEN_MLLM, Pack, put_adapter
from goldens import adapter_tensors


def test_a_missing_adapter_names_the_folders_searched(pack: Pack) -> None:
    node = pack.nodes["EasyRefLoader"]
    assert node.validate_inputs(adapter=GOLDEN, mllm=GOLDEN_MLLM) is True
    assert node.validate_inputs(adapter=ADAPTER_ONLY, mllm="from adapter") is True
    said = node.validate_inputs(adapter="gone.safetensors", mllm=GOLDEN_MLLM)
    assert "'gone.safetensors'" in said
    assert str(pack.base / "models" / "easyref") in said


def test_a_missing_mllm_names_the_folders_searched_and_what_was_found(pack: Pack) -> None:
    said = pack.nodes["EasyRefLoader"].validate_inputs(adapter=GOLDEN, mllm="gone")
    for part in ("'gone'", str(pack.base / "models" / "LLM"), GOLDEN_MLLM):
        assert part in said


@pytest.mark.parametrize(
    "adapter",
    [
        "../easyref/golden.safetensors",
        "../../models/easyref/golden.safetensors",
        "x/../golden.safetensors",
        "/golden.safetensors",
        "",
    ],
)
def test_an_adapter_outside_the_lists_is_refused(pack: Pack, adapter: str) -> None:
    said = pack.nodes["EasyRefLoader"].validate_inputs(adapter=adapter, mllm=GOLDEN_MLLM)
    assert repr(adapter) in said
    for mllm in ("../LLM/golden", "", "/"):
        said = pack.nodes["EasyRefLoader"].validate_inputs(adapter=GOLDEN, mllm=mllm)
        assert repr(mllm) in said


def test_the_lists_show_what_lies_in_the_folders(pack: Pack) -> None:
    inputs = {i.id: i for i in pack.nodes["EasyRefLoader"].define_schema().inputs}
    assert {GOLDEN, ADAPTER_ONLY} <= set(inputs["adapter"].options)
    assert inputs["mllm"].options[0] == "from adapter"
    assert GOLDEN_MLLM in inputs["mllm"].options


def test_a_changed_mllm_is_looked_at_anew(pack: Pack) -> None:
    folders = pack.base / "models" / "LLM"
    shutil.copytree(folders / GOLDEN_MLLM, folders / "changing")
    given = {"adapter": GOLDEN, "mllm": "changing", "precision": "auto"}
    node = pack.nodes["EasyRefLoader"]
    first = node.fingerprint_inputs(**given)
    assert node.fingerprint_inputs(**given) == first
    os.utime(folders / "changing" / "model.safetensors", ns=(1, 1))
    assert node.fingerprint_inputs(**given) != first


def test_a_changed_adapter_is_looked_at_anew(pack: Pack) -> None:
    name = put_adapter(pack, "fingerprint.safetensors", adapter_tensors())
    path = pack.base / "models" / "easyref" / name
    node = pack.nodes["EasyRefLoader"]

    def fingerprint(**settings: str) -> Any:
        given = {"adapter": name, "mllm": GOLDEN_MLLM, "precision": "auto"} | settings
        return node.fingerprint_inputs(**given)

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(precision="fp32") != first
    assert fingerprint(mllm="from adapter") != first
    os.utime(path, ns=(1, 1))
    assert fingerprint() != first
