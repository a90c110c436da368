"""What can be chosen at the Loader, what is refused before a run, and what is loaded again."""

from __future__ import annotations

import asyncio
import copy
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from comfyhost import ADAPTER_ONLY, GOLDEN, GOLDEN_MLLM, Pack, Prompt, put_adapter
from goldens import adapter_tensors

Refusals = list[tuple[str, str]]


@pytest.fixture
def refusals(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Refusals]:
    """(blamed input, what is said) by ComfyUI's own checks of a node before the run."""
    import execution

    import nodes

    def check(given: dict[str, Any], kind: str = "EasyRefLoader") -> Refusals:
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, kind, pack.nodes[kind])
        if kind == "EasyRefLoader":
            given = {"mllm": GOLDEN_MLLM, "precision": "auto"} | given
        graph = {"node": {"class_type": kind, "inputs": given}}
        valid, errors, _ = asyncio.run(execution.validate_inputs("run", graph, "node", {}))
        assert valid is not bool(errors)
        return [(error["extra_info"]["input_name"], error["details"]) for error in errors]

    return check


def test_a_missing_adapter_names_the_folders_searched(
    pack: Pack, refusals: Callable[..., Refusals]
) -> None:
    assert not refusals({"adapter": GOLDEN})
    assert not refusals({"adapter": ADAPTER_ONLY, "mllm": "from adapter"})
    ((blamed, said),) = refusals({"adapter": "gone.safetensors"})
    assert blamed == "adapter"
    assert "'gone.safetensors'" in said
    assert str(pack.base / "models" / "easyref") in said


def test_a_missing_mllm_is_refused_once_and_by_a_link_names_the_folders_searched(
    pack: Pack, refusals: Callable[..., Refusals]
) -> None:
    ((blamed, said),) = refusals({"adapter": GOLDEN, "mllm": "gone"})
    assert blamed == "mllm"
    for part in ("'gone'", GOLDEN_MLLM):
        assert part in said
    with pack.refused("'gone'", pack.base / "models" / "LLM", GOLDEN_MLLM):
        pack.run("EasyRefLoader", GOLDEN, "gone", "auto")


def test_names_saved_on_windows_are_found(
    pack: Pack, saved: str, refusals: Callable[..., Refusals]
) -> None:
    adapters, mllms = pack.base / "models" / "easyref", pack.base / "models" / "LLM"
    shutil.copytree(mllms / GOLDEN_MLLM, mllms / "from" / "elsewhere")
    (adapters / "sub").mkdir()
    shutil.copy(adapters / ADAPTER_ONLY, adapters / "sub" / "file.safetensors")
    tokens = pack.base / "output" / "easyref_tokens"
    (tokens / "windows").mkdir()
    shutil.copy(tokens / saved.removesuffix(" [output]"), tokens / "windows" / "x.safetensors")
    given = {"adapter": "sub\\file.safetensors", "mllm": "from\\elsewhere"}
    assert not refusals(dict(given))
    found = pack.run("EasyRefLoader", **given, precision="auto")
    assert found.checkpoint.path == adapters / "sub" / "file.safetensors"
    file = "windows\\x.safetensors [output]"
    assert not refusals({"file": file}, "EasyRefLoadTokens")
    assert pack.run("EasyRefLoadTokens", file).num_tokens


def test_a_real_backslash_in_a_name_is_no_separator(pack: Pack) -> None:
    if os.sep == "\\":
        pytest.skip("Windows has no such names")
    name = put_adapter(pack, "a\\b.safetensors", adapter_tensors())
    assert pack.run("EasyRefLoader", name, GOLDEN_MLLM, "auto").checkpoint.name == name


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
def test_an_adapter_outside_the_lists_is_refused(
    pack: Pack, refusals: Callable[..., Refusals], adapter: str
) -> None:
    ((blamed, said),) = refusals({"adapter": adapter})
    assert (blamed, repr(adapter) in said) == ("adapter", True)
    for mllm in ("../LLM/golden", "", "/"):
        ((blamed, said),) = refusals({"adapter": GOLDEN, "mllm": mllm})
        assert (blamed, repr(mllm) in said) == ("mllm", True)


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
