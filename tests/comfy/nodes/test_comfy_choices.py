"""What can be chosen at the Loader, what is refused before a run, and what is loaded again."""

from __future__ import annotations

import asyncio
import copy
import os
import shutil
from typing import Any

import pytest
from comfyhost import ADAPTER_ONLY, GOLDEN, GOLDEN_MLLM, Pack, Prompt, put_adapter
from goldens import adapter_tensors


def test_a_missing_adapter_names_the_folders_searched(pack: Pack) -> None:
    node = pack.nodes["EasyRefLoader"]
    assert node.validate_inputs(adapter=GOLDEN, mllm=GOLDEN_MLLM) is True
    assert node.validate_inputs(adapter=ADAPTER_ONLY, mllm="from adapter") is True
    said = node.validate_inputs(adapter="gone.safetensors", mllm=GOLDEN_MLLM)
    assert "'gone.safetensors'" in said
    assert str(pack.base / "models" / "easyref") in said


def test_a_missing_mllm_names_the_folders_searched_and_those_present(pack: Pack) -> None:
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


def test_the_lists_show_the_folders_contents(pack: Pack) -> None:
    inputs = {i.id: i for i in pack.nodes["EasyRefLoader"].define_schema().inputs}
    assert {GOLDEN, ADAPTER_ONLY} <= set(inputs["adapter"].options)
    assert inputs["mllm"].options[0] == "from adapter"
    assert GOLDEN_MLLM in inputs["mllm"].options


def test_a_changed_mllm_is_loaded_again(pack: Pack) -> None:
    folders = pack.base / "models" / "LLM"
    shutil.copytree(folders / GOLDEN_MLLM, folders / "changing")
    given = {"adapter": GOLDEN, "mllm": "changing", "precision": "auto"}
    node = pack.nodes["EasyRefLoader"]
    first = node.fingerprint_inputs(**given)
    assert node.fingerprint_inputs(**given) == first
    os.utime(folders / "changing" / "model.safetensors", ns=(1, 1))
    assert node.fingerprint_inputs(**given) != first


def test_a_changed_adapter_is_loaded_again(pack: Pack) -> None:
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


@pytest.fixture
def saved(pack: Pack, tokens: Any) -> str:
    """Saved tokens, by their name in the graph."""
    result = pack.nodes["EasyRefSaveTokens"].execute(tokens, "chosen", "output")
    return f"{result.ui['tokens'][0]['filename']} [output]"


@pytest.mark.parametrize(
    "linked", [("adapter",), ("mllm",), ("adapter", "mllm"), ("file",)], ids=str
)
def test_linked_inputs_are_neither_refused_nor_always_new(
    pack: Pack, saved: str, monkeypatch: pytest.MonkeyPatch, linked: tuple[str, ...]
) -> None:
    """By ComfyUI's own checks, which hand None to the node for such inputs."""
    import execution

    import nodes

    class Given:
        """Any value, of any type."""

        RETURN_TYPES = (type("Anything", (str,), {"__ne__": lambda *_: False, "__hash__": None})(),)

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {}}

    kind = "EasyRefLoadTokens" if "file" in linked else "EasyRefLoader"
    given = {"file": saved}
    if kind == "EasyRefLoader":
        given = {"adapter": GOLDEN, "mllm": GOLDEN_MLLM, "precision": "auto"}
    for name, found in ((kind, pack.nodes[kind]), ("Given", Given)):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, found)
    graph = {
        "given": {"class_type": "Given", "inputs": {}},
        "node": {"class_type": kind, "inputs": given | {name: ["given", 0] for name in linked}},
    }
    valid, errors, _ = asyncio.run(execution.validate_inputs("run", graph, "node", {}))
    assert valid, errors

    def fingerprint() -> Any:
        cache = execution.IsChangedCache("run", Prompt(copy.deepcopy(graph)), None)
        return asyncio.run(cache.get("node"))

    assert isinstance(fingerprint(), list)  # a number that is none where the node failed
    assert fingerprint() == fingerprint()


def test_a_folder_that_cannot_be_read_hides_no_other(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = pack.base / "models" / "LLM" / "closed"
    closed.mkdir()
    listed = type(closed).iterdir

    def iterdir(path: Any) -> Any:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(type(closed), "iterdir", iterdir)
    inputs = {i.id: i for i in pack.nodes["EasyRefLoader"].define_schema().inputs}
    assert GOLDEN_MLLM in inputs["mllm"].options


def test_a_broken_link_is_ignored(pack: Pack, saved: str) -> None:
    """As the hub's cache leaves them when a file was deleted."""
    folder = pack.base / "models" / "LLM" / "with_dead_link"
    shutil.copytree(pack.base / "models" / "LLM" / GOLDEN_MLLM, folder)
    (folder / "gone.json").symlink_to(folder / "nowhere.json")
    given = {"adapter": GOLDEN, "mllm": folder.name, "precision": "auto"}
    first = pack.nodes["EasyRefLoader"].fingerprint_inputs(**given)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert pack.nodes["EasyRefLoader"].fingerprint_inputs(**given) != first
    (pack.base / "output" / "easyref_tokens" / "dead.safetensors").symlink_to("nowhere")
    inputs = {i.id: i for i in pack.nodes["EasyRefLoadTokens"].define_schema().inputs}
    assert saved in inputs["file"].options
    assert "dead.safetensors [output]" not in inputs["file"].options
