"""The comparison of node interfaces finds what breaks saved workflows, and nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compare_nodes import broken, main

Nodes = dict[str, Any]
RELEASED = Path(__file__).parents[1] / "comfy" / "released_nodes.json"


@pytest.fixture
def released() -> Nodes:
    return json.loads(RELEASED.read_text(encoding="utf-8"))


def _changed(nodes: Nodes, change: Callable[[Nodes], object]) -> Nodes:
    other = copy.deepcopy(nodes)
    change(other)
    return other


def test_the_same_nodes_break_nothing(released: Nodes) -> None:
    assert broken(released, released) == []


def test_new_nodes_and_optional_inputs_at_the_end_break_nothing(released: Nodes) -> None:
    def change(nodes: Nodes) -> None:
        nodes["EasyRefNew"] = nodes["EasyRefEncode"]
        nodes["EasyRefApply"]["inputs"]["new"] = {"type": "MASK", "optional": True}
        nodes["EasyRefApply"]["outputs"].append(["more", "MASK"])

    assert broken(released, _changed(released, change)) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda n: n.pop("EasyRefApply"), "EasyRefApply: the node is gone"),
        (lambda n: n["EasyRefApply"]["inputs"].pop("weight"), "the input weight is gone"),
        (
            lambda n: n["EasyRefApply"]["inputs"]["weight"].update(type="INT"),
            "the input weight was FLOAT and is INT",
        ),
        (
            lambda n: n["EasyRefApply"]["inputs"]["mask"].update(optional=False),
            "the input mask was optional and is required",
        ),
        (
            lambda n: n["EasyRefEncode"]["inputs"]["aggregation"]["options"].remove("average"),
            "the input aggregation has lost average",
        ),
        (
            lambda n: n["EasyRefApply"]["inputs"]["weight"].update(max=2.0),
            "the input weight had max 3.0 and has 2.0",
        ),
        (
            lambda n: n["EasyRefApply"]["inputs"].update(
                weight=n["EasyRefApply"]["inputs"].pop("weight")
            ),
            "its inputs have changed places",
        ),
        (
            lambda n: n["EasyRefApply"].update(
                inputs={
                    "new": {"type": "MASK", "optional": True},
                    **n["EasyRefApply"]["inputs"],
                }
            ),
            "new inputs (new) stand before old ones",
        ),
        (
            lambda n: n["EasyRefApply"]["inputs"].update(new={"type": "MASK", "optional": False}),
            "the new input new is required",
        ),
        (
            lambda n: n["EasyRefReferences"]["inputs"]["images"].update(first="image_0"),
            "the sockets of images were image_1 and are image_0",
        ),
        (
            lambda n: n["EasyRefReferences"]["inputs"]["images"].update(count=50),
            "the input images had count 100 and has 50",
        ),
        (lambda n: n["EasyRefApply"]["outputs"].clear(), "EasyRefApply: its outputs were"),
    ],
)
def test_what_breaks_saved_workflows_is_named(
    released: Nodes, change: Callable[[Nodes], object], sentence: str
) -> None:
    found = broken(released, _changed(released, change))
    assert len(found) == 1
    assert sentence in found[0]


def test_the_command_ends_with_one_when_something_breaks(
    released: Nodes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps(_changed(released, lambda n: n.pop("EasyRefApply"))))
    assert main([str(RELEASED), str(RELEASED)]) == 0
    assert main([str(RELEASED), str(fewer)]) == 1
    assert "EasyRefApply: the node is gone" in capsys.readouterr().out
    assert main([str(RELEASED)]) == 2
