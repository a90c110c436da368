"""What ComfyUI runs again when a template changes, by its own cache keys."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from comfyhost import Pack, Prompt

from workshop.demo.workflow import (
    WORKFLOWS,
    Graph,
    load_workflow,
    set_inputs,
    use_demo_models,
)

TEMPLATES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
SCORES = {"EasyRefScore", "PreviewAny"}  # of the result
RESULT = {"EmptyLatentImage", "KSampler", "VAEDecode", "SaveImage"}


class Unchanged:
    """Stands for `IsChangedCache`: no file is another one."""

    async def get(self, number: str) -> bool:
        return False


class Stub:
    """For ComfyUI's own nodes that are not loaded in tests."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}


def keys(graph: Graph) -> dict[str, Any]:
    from comfy_execution.caching import CacheKeySetInputSignature

    key_set = CacheKeySetInputSignature(Prompt(graph), [], Unchanged())
    asyncio.run(key_set.add_keys(list(graph)))
    return key_set.keys


@pytest.fixture
def _node_classes(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    import nodes

    graphs = [load_workflow(name) for name in TEMPLATES]
    kinds = {node["class_type"] for graph in graphs for node in graph.values()}
    for kind in kinds - nodes.NODE_CLASS_MAPPINGS.keys():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, kind, pack.nodes.get(kind, Stub))


@pytest.mark.usefixtures("_node_classes")
@pytest.mark.parametrize("models", ["yours", "demo"])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("change", [{"batch_size": 3}, {"width": 832, "height": 1216}], ids=str)
def test_another_size_or_batch_runs_the_sampling_again_and_no_more(
    name: str, models: str, change: dict[str, int]
) -> None:
    graph = load_workflow(name)
    if models == "demo":
        graph = use_demo_models(graph)
    before, after = keys(graph), keys(set_inputs(graph, "EmptyLatentImage", **change))
    again = {graph[number]["class_type"] for number in graph if before[number] != after[number]}
    assert again - SCORES == RESULT
