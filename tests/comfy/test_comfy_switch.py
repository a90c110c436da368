"""EasyRef Demo Models between the loaders and the graph: yours, or the demo's, never both."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from comfyhost import Pack

NEEDED = ("model", "clip", "vae", "easyref")


@pytest.fixture
def yours() -> dict[str, Any]:
    """What loaders give; the node must not look into it."""
    return {name: object() for name in NEEDED}


def test_connected_models_are_passed_on_as_they_are(pack: Pack, yours: dict[str, Any]) -> None:
    control_net = object()
    outputs = pack.nodes["EasyRefDemoModels"].execute(**yours, control_net=control_net).result
    assert list(outputs) == [*yours.values(), control_net]


def test_the_demo_controlnet_is_not_mixed_with_your_models(
    pack: Pack, yours: dict[str, Any]
) -> None:
    from comfy_execution.graph_utils import ExecutionBlocker

    *models, control_net = pack.nodes["EasyRefDemoModels"].execute(**yours).result
    assert models == [*yours.values()]
    assert isinstance(control_net, ExecutionBlocker)
    assert control_net.message.endswith(".")
    assert "Load ControlNet Model" in control_net.message


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_gap_is_named(pack: Pack, yours: dict[str, Any], count: int) -> None:
    for missing in combinations(NEEDED, count):
        given = {name: value for name, value in yours.items() if name not in missing}
        with pack.refused(f"has {', '.join(given)} connected, but not {', '.join(missing)}:"):
            pack.nodes["EasyRefDemoModels"].execute(**given)


def test_a_controlnet_alone_is_refused(pack: Pack) -> None:
    with pack.refused("has control_net connected, but not model, clip, vae, easyref"):
        pack.nodes["EasyRefDemoModels"].execute(control_net=object())
