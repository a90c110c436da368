"""The demo's parts that need no ComfyUI: graphs rewired, pictures drawn, a server that dies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from easyref_core.demo.comfy_client import ComfyUIError
from easyref_core.demo.comfy_server import ComfyServer
from easyref_core.demo.drawing import FOX, MOUSE, draw_references
from easyref_core.demo.parts import Pictures, draw_material
from easyref_core.demo.run import write_results
from easyref_core.demo.thumbnail import write_thumbnail
from easyref_core.demo.workflow import (
    DEMO_NODE,
    Graph,
    load_workflow,
    set_inputs,
    use_demo_models,
    without_easyref,
)
from easyref_core.errors import EasyRefError

WORKFLOWS = (
    "easyref_character",
    "easyref_controlnet",
    "easyref_save_tokens",
    "easyref_load_tokens",
)


def links(graph: Graph) -> list[list[object]]:
    return [v for node in graph.values() for v in node["inputs"].values() if isinstance(v, list)]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_switch_replaces_all_loaders_and_nothing_else(name: str) -> None:
    graph = load_workflow(name)
    changed = use_demo_models(graph)
    classes = {node["class_type"] for node in changed.values()}
    loaders = {"CheckpointLoaderSimple", "EasyRefLoader", "ControlNetLoader"}
    assert not loaders & classes
    assert {link[0] for link in links(changed)} <= changed.keys()
    untouched = {n: graph[n]["class_type"] for n in graph if graph[n]["class_type"] not in loaders}
    assert {n: changed[n]["class_type"] for n in changed if n != DEMO_NODE} == untouched
    assert graph == load_workflow(name)


def test_each_loader_output_has_its_stand_in() -> None:
    graph = use_demo_models(load_workflow("easyref_controlnet"))
    by_class = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert by_class["EasyRefApply"]["model"] == [DEMO_NODE, 0]
    assert by_class["CLIPTextEncode"]["clip"] == [DEMO_NODE, 1]
    assert by_class["VAEDecode"]["vae"] == [DEMO_NODE, 2]
    assert by_class["EasyRefEncode"]["easyref"] == [DEMO_NODE, 3]
    assert by_class["ControlNetApplyAdvanced"]["control_net"] == [DEMO_NODE, 4]


def test_without_easyref_the_model_goes_straight_to_the_sampler() -> None:
    graph = without_easyref(load_workflow("easyref_character"))
    by_class = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert "EasyRefApply" not in by_class
    assert by_class["KSampler"]["model"] == ["1", 0]


def test_setting_an_input_needs_one_node_of_the_class() -> None:
    graph = load_workflow("easyref_character")
    assert set_inputs(graph, "KSampler", seed=9)["13"]["inputs"]["seed"] == 9
    assert graph["13"]["inputs"]["seed"] != 9
    with pytest.raises(EasyRefError, match="2 nodes of class CLIPTextEncode"):
        set_inputs(graph, "CLIPTextEncode", text="")


def test_the_references_differ_in_size_and_are_the_same_every_time() -> None:
    first, again = draw_references(FOX), draw_references(FOX)
    assert len({picture.size for picture in first}) == 3
    assert [p.tobytes() for p in first] == [p.tobytes() for p in again]
    assert [p.tobytes() for p in first] != [p.tobytes() for p in draw_references(MOUSE)]


def test_sheet_thumbnail_and_parts_are_written(tmp_path: Path) -> None:
    greys = [Image.new("RGB", (96, 96), (level,) * 3) for level in (0, 64, 128, 192, 255)]
    sheet = write_results(draw_material(), Pictures(*greys, made_by="a test"), tmp_path)
    assert Image.open(sheet).width > 1000
    thumbnail = Image.open(write_thumbnail(tmp_path, tmp_path / "thumbnail.jpg"))
    assert thumbnail.width > thumbnail.height
    with pytest.raises(EasyRefError, match=r"reference_1\.png"):
        write_thumbnail(tmp_path / "absent", tmp_path / "thumbnail.jpg")


def test_diffusers_makes_every_picture_by_its_own_conditioning() -> None:
    pytest.importorskip("diffusers")
    from easyref_core.demo.diffusers_backend import make_pictures

    material = draw_material()
    settings = replace(material.settings, steps=2, side=64)
    pictures = make_pictures(replace(material, settings=settings))
    made = [pictures.prompt_only, pictures.easyref, pictures.others, pictures.controlled]
    assert [picture.size for picture in made] == [(64, 64)] * 4
    assert len({picture.tobytes() for picture in made}) == 4


def test_a_server_that_dies_says_why(tmp_path: Path) -> None:
    comfyui = tmp_path / "comfyui"
    comfyui.mkdir()
    (comfyui / "main.py").write_text("print('a module is missing'); raise SystemExit(3)\n")
    with pytest.raises(ComfyUIError, match="ended with status 3") as caught:
        ComfyServer(comfyui, tmp_path / "base").start()
    assert "a module is missing" in str(caught.value)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    comfyui = tmp_path / "comfyui"
    comfyui.mkdir()
    (comfyui / "main.py").write_text("import time; time.sleep(60)\n")
    server = ComfyServer(comfyui, tmp_path / "base", seconds=0.5)
    with pytest.raises(ComfyUIError, match="not ready after"):
        server.start()
    with pytest.raises(ComfyUIError, match="not running"):
        server.get("/system_stats")
