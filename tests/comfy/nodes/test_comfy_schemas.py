"""The nodes as ComfyUI and saved workflows know them."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyhost import GOLDEN, GOLDEN_MLLM, NAME, ROOT, Pack

RELEASED = Path(__file__).parents[1] / "released_nodes.json"
PERMANENT = (
    "Node ids, input names, types and outputs are permanent: saved workflows hold them. Add "
    "inputs as optional ones at the end instead; only what is added on purpose may be added to "
    f"{RELEASED.name}."
)
FROM_FOLDERS = (
    "adapter",
    "mllm",
    "file",
    "clip_model",
    "dino_model",
)  # combos whose choices are the user's files
MAX_IMPORT_SECONDS = 0.3


def described(node: Any) -> dict[str, Any]:
    """Everything of a node that a saved workflow depends on."""
    schema = node.GET_SCHEMA()
    inputs: dict[str, Any] = {}
    for given in schema.inputs:
        entry = {"type": given.get_io_type(), "optional": given.optional}
        for name in ("default", "min", "max", "step", "options"):
            value = getattr(given, name, None)
            if value is not None and not (name == "options" and given.id in FROM_FOLDERS):
                entry[name] = value
        if (template := getattr(given, "template", None)) is not None:
            kind = template.input.get_io_type()
            entry |= {"sockets": kind, "first": template.names[0], "count": len(template.names)}
            assert template.names == [
                template.names[0].replace("1", str(n + 1)) for n in range(entry["count"])
            ]
        inputs[given.id] = entry
    return {
        "inputs": inputs,
        "outputs": [[o.display_name, o.get_io_type()] for o in schema.outputs],
        "output_node": schema.is_output_node,
    }


@pytest.fixture
def nodes(pack: Pack) -> dict[str, Any]:
    return dict(pack.nodes)


def test_nodes_are_what_was_released(nodes: dict[str, Any]) -> None:
    released = json.loads(RELEASED.read_text(encoding="utf-8"))
    found = {name: described(node) for name, node in nodes.items()}
    assert sorted(found) == sorted(released), PERMANENT
    for name, expected in released.items():
        # Compared as text, so that the order of the inputs counts: widget values are saved by it.
        assert json.dumps(found[name], indent=1) == json.dumps(expected, indent=1), PERMANENT


def test_every_node_and_input_and_output_is_explained(nodes: dict[str, Any]) -> None:
    for name, node in nodes.items():
        schema = node.GET_SCHEMA()
        assert schema.category == "EasyRef"
        assert schema.display_name.startswith("EasyRef ")
        assert schema.node_id == name == node.__name__
        assert len(schema.description) > 30
        for part in (*schema.inputs, *schema.outputs):
            assert part.tooltip, f"{name}: {part.id or part.display_name} has no tooltip"
            assert part.tooltip.endswith("."), f"{name}: {part.tooltip}"
        assert all(o.display_name for o in schema.outputs)


def test_every_number_has_its_range(nodes: dict[str, Any]) -> None:
    from comfy_api.latest import io

    numbers = [
        (name, given)
        for name, node in nodes.items()
        for given in node.GET_SCHEMA().inputs
        if isinstance(given, (io.Int.Input, io.Float.Input))
    ]
    assert len(numbers) >= 6
    for name, given in numbers:
        assert None not in (given.min, given.max, given.step, given.default), (name, given.id)
        assert given.min <= given.default <= given.max
        assert given.step > 0


def test_defaults_are_the_functions_own_names(nodes: dict[str, Any]) -> None:
    """ComfyUI calls `execute` with exactly the inputs by name."""
    import inspect

    for name, node in nodes.items():
        signature = inspect.signature(node.execute)
        open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        for given in node.GET_SCHEMA().inputs:
            parameter = signature.parameters.get(given.id)
            assert parameter is not None or open_ended, f"{name}.execute lacks {given.id}"
            if parameter is not None and given.optional:
                assert parameter.default is not parameter.empty, f"{name}: {given.id}"


def test_comfyui_accepts_the_schemas(pack: Pack, nodes: dict[str, Any]) -> None:
    """What the server sends to the browser, for every node."""
    for name, node in nodes.items():
        node.VALIDATE_CLASS()
        info = node.GET_NODE_INFO_V1()
        assert info["name"] == name
        json.dumps(info)
    extension = asyncio.run(sys.modules[NAME].comfy_entrypoint())
    assert asyncio.run(extension.get_node_list()) == list(pack.nodes.values())
    assert not hasattr(sys.modules[NAME], "NODE_CLASS_MAPPINGS"), "comfy_entrypoint is ignored then"
    assert (ROOT / sys.modules[NAME].WEB_DIRECTORY).is_dir()


def test_nodes_can_be_found_by_reading_the_source(nodes: dict[str, Any]) -> None:
    """ComfyUI-Manager reads classes that derive directly from io.ComfyNode, and literal ids."""
    found: set[str] = set()
    for path in (ROOT / "nodes").rglob("*.py"):
        for item in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(item, ast.ClassDef) or item.name not in nodes:
                continue
            assert [ast.unparse(base) for base in item.bases] == ["io.ComfyNode"]
            found |= {
                keyword.value.value
                for call in ast.walk(item)
                if isinstance(call, ast.Call)
                for keyword in call.keywords
                if keyword.arg == "node_id" and isinstance(keyword.value, ast.Constant)
            }
    assert found == set(nodes)


IMPORT_SCRIPT = """
import asyncio, builtins, gc, importlib.util, json, socket, sys, time
comfyui, root, base = sys.argv[1:4]
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu", "--base-directory", base]
import comfy.options
comfy.options.enable_args_parsing()
import utils.extra_config
import nodes
import comfy_api.latest
# ComfyUI's server stands before any pack is imported, and brings this.
import aiohttp.web

asked, sockets = set(), []
original = builtins.__import__
def noted(name, globals=None, *args, **kwargs):
    if str((globals or {}).get("__name__", "")).startswith("pack"):
        asked.add(name.split(".")[0])
    return original(name, globals, *args, **kwargs)
class Socket(socket.socket):
    def connect(self, *address):
        sockets.append(str(address))
        return super().connect(*address)
socket.socket = Socket
before = set(sys.modules)
builtins.__import__ = noted
# Going through all objects of ComfyUI takes Python longer than the import, and may fall on it.
gc.disable()
start = time.process_time()
spec = importlib.util.spec_from_file_location(
    "pack", root + "/__init__.py", submodule_search_locations=[root]
)
module = importlib.util.module_from_spec(spec)
sys.modules["pack"] = module
spec.loader.exec_module(module)
extension = asyncio.run(module.comfy_entrypoint())
for node in asyncio.run(extension.get_node_list()):
    node.GET_SCHEMA()
seconds = time.process_time() - start
builtins.__import__ = original
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps({
    "seconds": seconds, "asked": sorted(asked), "new": sorted(new), "sockets": sockets,
}))
"""


def test_the_import_is_quick_and_brings_nothing_heavy(comfyui: Path, tmp_path: Path) -> None:
    script = tmp_path / "import_the_pack.py"
    script.write_text(IMPORT_SCRIPT, encoding="utf-8")
    (tmp_path / "base").mkdir()
    done = subprocess.run(
        [sys.executable, str(script), str(comfyui), str(ROOT), str(tmp_path / "base")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seconds"] < MAX_IMPORT_SECONDS
    assert {"torch", "comfy"} <= set(found["asked"]), "nothing was watched"
    heavy = {"transformers", "diffusers", "einops", "accelerate", "requests", "torchvision"}
    assert not heavy & set(found["asked"])
    assert not heavy & set(found["new"])
    assert not found["sockets"]


def numbers_held(root: Any) -> int:
    """Numbers in all tensors that an object of the pack holds, at any depth."""
    found, seen, waiting = 0, set(), [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found += item.numel()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif isinstance(item, torch.nn.Module):
            waiting += item.parameters()
        elif type(item).__module__.startswith((NAME, "comfy.")):
            waiting.append(vars(item))
    return found


def test_a_loaded_adapter_holds_no_weights(pack: Pack) -> None:
    """ComfyUI keeps what nodes give, so it must cost nothing; the patcher holds what is big, and
    what is kept of earlier groups is bounded.
    """
    easyref = pack.run("EasyRefLoader", GOLDEN, GOLDEN_MLLM, "auto")
    demo = pack.nodes["EasyRefDemoModels"].execute().result[3]
    assert (numbers_held(easyref), numbers_held(demo)) == (0, 0)
    assert numbers_held(pack.nodes["EasyRefDemoModels"].execute().result[0]) > 1000
    picture = torch.rand(1, 30, 40, 3)
    pack.run("EasyRefEncode", easyref, "", "easyref", 84, images=picture)
    patcher = easyref.encoder.patcher
    cache = easyref.encoder._cache
    assert numbers_held(easyref) > numbers_held(patcher) + numbers_held(cache._pictures)
    easyref.encoder.forget()
    assert numbers_held(easyref) == numbers_held(patcher)


def test_the_demo_node_loads_every_model_and_four_references(pack: Pack) -> None:
    from comfy.controlnet import ControlNet
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

    outputs = pack.nodes["EasyRefDemoModels"].execute().result
    model = pack.part("nodes.link_types").EasyRefModel
    kinds = (ModelPatcher, CLIP, VAE, model, ControlNet, torch.Tensor)
    assert [type(o) for o in outputs] == list(kinds)
    images = outputs[-1]
    assert images.shape == (4, 256, 256, 3)
    assert images.min() >= 0
    assert images.max() <= 1
    assert len(images.unique(dim=0)) == 4


def test_errors_are_shown_without_the_packs_folder(pack: Pack) -> None:
    errors = pack.part("easyref_core.errors")
    assert errors.EasyRefError.__module__ == "easyref"


def test_nodes_have_search_words(nodes: dict[str, Any]) -> None:
    from comfy_api.latest import io

    aliases = {name: node.GET_NODE_INFO_V1().get("search_aliases") for name, node in nodes.items()}
    if not hasattr(io.Schema(node_id="any"), "search_aliases"):  # before 0.11
        assert set(aliases.values()) == {None}
        return
    for name, words in aliases.items():
        assert len(set(words)) == len(words) >= 2, name
        assert all(word == word.lower().strip() for word in words), name
    for word in ("ip-adapter", "ipadapter", "reference", "character", "style", "consistent"):
        assert word in aliases["EasyRefQuick"]
        assert word in aliases["EasyRefApply"]


def test_advanced_inputs_have_a_default(nodes: dict[str, Any]) -> None:
    from comfy_api.latest import io

    folded = {
        f"{name}.{given.id}": given.default
        for name, node in nodes.items()
        for given in node.GET_SCHEMA().inputs
        if getattr(given, "advanced", None)
    }
    if not hasattr(io.Float.Input("any"), "advanced"):  # before 0.10
        assert not folded
        return
    assert {"EasyRefApply.lora_strength", "EasyRefEncode.image_size"} <= folded.keys()
    assert None not in folded.values()
