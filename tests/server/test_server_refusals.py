"""The error messages that a user reads in ComfyUI when a graph cannot run."""

from __future__ import annotations

import pytest
from server_graphs import small

from workshop.comfyui.comfy_client import ComfyUIError
from workshop.comfyui.comfy_server import ComfyServer
from workshop.demo.workflow import Graph, load_workflow, set_inputs, use_demo_models


def refusal(server: ComfyServer, graph: Graph) -> str:
    with pytest.raises(ComfyUIError) as caught:
        server.run(graph)
    return str(caught.value)


@pytest.mark.parametrize("name", ["absent.safetensors", "../../secret.safetensors", "/etc/hosts"])
def test_an_adapter_that_is_not_in_the_folders_is_refused_before_the_run(
    server: ComfyServer, name: str
) -> None:
    graph = set_inputs(load_workflow("easyref_save_tokens"), "EasyRefLoader", adapter=name)
    message = refusal(server, graph)
    assert f"There is no adapter {name!r} in" in message
    assert "models/easyref" in message


def test_an_mllm_that_is_not_in_the_folders_is_refused_before_the_run(server: ComfyServer) -> None:
    adapters = server.base / "models" / "easyref"
    adapters.mkdir(exist_ok=True)
    (adapters / "any.safetensors").touch()
    graph = load_workflow("easyref_save_tokens")
    graph = set_inputs(graph, "EasyRefLoader", adapter="any.safetensors", mllm="../LLM")
    message = refusal(server, graph)
    assert "mllm: '../LLM' not in ['from adapter'" in message
    assert message.count("'../LLM'") == 1


@pytest.mark.parametrize("name", ["absent.safetensors", "../tokens.safetensors [output]"])
def test_tokens_that_are_not_in_the_folders_are_refused_before_the_run(
    server: ComfyServer, name: str
) -> None:
    graph = set_inputs(small("easyref_load_tokens"), "EasyRefLoadTokens", file=name)
    assert f"There are no saved tokens {name!r} in" in refusal(server, graph)


@pytest.mark.parametrize("prefix", ["../../outside", "/outside", ""])
def test_tokens_are_only_saved_inside_the_folder(server: ComfyServer, prefix: str) -> None:
    graph = use_demo_models(load_workflow("easyref_save_tokens"))
    graph = set_inputs(graph, "EasyRefSaveTokens", filename_prefix=prefix)
    assert f"filename_prefix {prefix!r} cannot be used" in refusal(server, graph)


def test_a_start_after_the_end_is_refused(server: ComfyServer) -> None:
    graph = set_inputs(small(), "EasyRefApply", start_percent=0.8, end_percent=0.2)
    message = refusal(server, graph)
    assert message.startswith("EasyRefApply")
    assert "start_percent (0.8) is after end_percent (0.2)" in message


def test_the_exception_type_does_not_contain_the_packs_folder(server: ComfyServer) -> None:
    refusal(server, set_inputs(small(), "EasyRefApply", start_percent=0.8, end_percent=0.2))
    (last,) = server.get_json("/history?max_items=1").values()
    messages = dict(last["status"]["messages"])
    assert messages["execution_error"]["exception_type"] == "easyref.EasyRefError"


def test_no_picture_at_all_is_refused(server: ComfyServer) -> None:
    graph = small()
    for node in graph.values():
        if node["class_type"] == "EasyRefEncode":
            del node["inputs"]["references"]
    assert "There is no reference picture" in refusal(server, graph)


def test_a_value_out_of_range_is_refused_by_comfyui(server: ComfyServer) -> None:
    message = refusal(server, set_inputs(small(), "EasyRefApply", weight=9.0))
    assert "weight" in message
    assert "bigger than max" in message
