"""The ways in through ComfyUI: graphs in its own executor, lists of choices, the pack's routes.

A graph that ComfyUI refuses comes back as EasyRefError where the pack refused it, and as
RuntimeError with ComfyUI's own words else.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import comfyhost
import torch
from aiohttp import ClientSession, web
from entry_points import SIZE, cut
from homes import PROMPT, Home

from easyref_core.errors import EasyRefError

_pack: comfyhost.Pack | None = None


def prepare(comfyui: str, base: str) -> None:
    """Import ComfyUI with the pack, and the golden UNet."""
    global _pack
    sys.modules["server"] = _server_with_routes()
    _pack = comfyhost.start(Path(comfyui), Path(base))
    import execution  # noqa: F401

    import nodes

    nodes.NODE_CLASS_MAPPINGS |= _pack.nodes
    nodes.NODE_CLASS_MAPPINGS |= {"TestModel": TestModel, "TestValue": TestValue}
    nodes.NODE_CLASS_MAPPINGS |= {"TestSample": TestSample, "TestSizes": TestSizes}
    nodes.NODE_CLASS_MAPPINGS |= {"TestCut": TestCut}
    _unet()


def _server_with_routes() -> Any:
    """As much of ComfyUI's server module as the pack asks for."""
    instance = SimpleNamespace(routes=web.RouteTableDef())
    return SimpleNamespace(PromptServer=SimpleNamespace(instance=instance))


@cache
def _unet() -> Any:
    return comfyhost.golden_unet(_pack)


# Nodes, in ComfyUI's own executor


class TestModel:
    """Gives the golden UNet."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})

    def run(self) -> tuple[Any]:
        return (_unet().clone(),)


class TestValue:
    """Gives any value, as another pack's node may."""

    RETURN_TYPES = ("*",)
    FUNCTION = "run"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"name": ("STRING", {})}})

    def run(self, name: str) -> tuple[Any]:
        return (link_value(name),)


class TestSample:
    """One step with a model."""

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL", {})}})

    def run(self, model: Any) -> Any:
        prediction = comfyhost.predict(model, cfg=3.0)
        if not prediction.isfinite().all():
            raise RuntimeError("the prediction is not finite")
        return {"ui": {"largest": [float(prediction.abs().max())]}}


class TestCut:
    """Passes a value on, and cuts a file off in place, as a download that starts again does."""

    RETURN_TYPES = ("*",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> Any:
        return {"required": {"value": ("*", {}), "path": ("STRING", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: Any) -> bool:
        return True

    def run(self, value: Any, path: str) -> tuple[Any]:
        cut(Path(path))
        return (value,)


class TestSizes:
    """The sizes of references."""

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    INPUT_TYPES = classmethod(lambda cls: {"required": {"references": ("EASYREF_REFERENCES", {})}})

    def run(self, references: Any) -> Any:
        return {"ui": {"sizes": [list(reference.picture.size) for reference in references]}}


def link_value(name: str) -> Any:
    """The values that cases link."""
    values: dict[str, Any] = {
        "nan": math.nan,
        "inf": math.inf,
        "-inf": -math.inf,
        "1e30": 1e30,
        "10**400": 10**400,
        "true": True,
        "none": None,
        "text": "text",
        "list": [1.0],
        "object": object(),
        "tensor": torch.ones(2, 2),
        "nan tensor": torch.full((1, 8, 8), math.nan),
    }
    return values[name]


def use_home(base: str) -> Home:
    """Let ComfyUI look for files in this home; only this child does."""
    import folder_paths

    home = Home(Path(base))
    for kind, folder in (
        ("easyref", home.adapter.parent),
        ("LLM", home.mllm.parent),
        ("easyref_tokens", home.tokens.parent),
    ):
        _, extensions = folder_paths.folder_names_and_paths[kind]
        folder_paths.folder_names_and_paths[kind] = ([str(folder)], extensions)
    folder_paths.filename_list_cache.clear()
    folder_paths.models_dir = str(home.base / "models")
    folder_paths.set_input_directory(str(home.picture.parent))
    folder_paths.set_output_directory(str(home.base / "output"))
    folder_paths.set_temp_directory(str(home.base / "temp"))
    return home


def graph(base: str, name: str = "whole", **inputs: Any) -> Any:
    """Run one of `GRAPHS` as ComfyUI does; `node__input=value` replaces an input."""
    use_home(base)
    return _run_graph(changed(GRAPHS[name], inputs))


def graph_cut(base: str, after: str, *parts: str) -> Any:
    """Cut a file of the home off after a node has run, before the next one does."""
    home = use_home(base)
    path = str(home.base.joinpath(*parts))
    graph = changed(GRAPHS["whole"], {})
    graph["cut"] = _node("TestCut", value=[after, 0], path=path)
    for node in (node for name, node in graph.items() if name != "cut"):
        for key, value in node["inputs"].items():
            if value == [after, 0]:
                node["inputs"][key] = ["cut", 0]
    return _run_graph(graph)


def changed(given: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    graph = {number: {**node, "inputs": dict(node["inputs"])} for number, node in given.items()}
    for name, value in inputs.items():
        node, _, key = name.partition("__")
        if isinstance(value, dict) and "link" in value:
            graph[f"value {name}"] = _node("TestValue", name=value["link"])
            value = [f"value {name}", 0]
        graph[node]["inputs"][key] = value
    return graph


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


_GALLERY = '{"version": 1, "pictures": [{"file": "picture.png"}]}'
_LOADER = _node("EasyRefLoader", adapter="adapter.safetensors", mllm="mllm", precision="auto")
_APPLY = _node(
    "EasyRefApply",
    model=["model", 0],
    easyref=["loader", 0],
    tokens=["tokens", 0],
    weight=1.0,
    start_percent=0.0,
    end_percent=1.0,
    lora_strength=1.0,
)
_SAMPLED = {
    "model": _node("TestModel"),
    "loader": _LOADER,
    "apply": _APPLY,
    "sample": _node("TestSample", model=["apply", 0]),
}
GRAPHS: dict[str, dict[str, Any]] = {
    # From the files to a step of sampling.
    "whole": {
        **_SAMPLED,
        "references": _node("EasyRefReferences", weight=1.0, gallery=_GALLERY),
        "tokens": _node(
            "EasyRefEncode",
            easyref=["loader", 0],
            references=["references", 0],
            prompt=PROMPT,
            aggregation="easyref",
            image_size=SIZE,
        ),
    },
    # Pictures alone, each of at most 4096 x 4096 pixels.
    "pictures": {
        "references": _node("EasyRefReferences", weight=1.0, gallery=_GALLERY),
        "sizes": _node("TestSizes", references=["references", 0]),
    },
    "saved": {**_SAMPLED, "tokens": _node("EasyRefLoadTokens", file="tokens.safetensors")},
}


def _run_graph(graph: dict[str, Any]) -> Any:
    import execution

    server = SimpleNamespace(
        client_id=None, last_node_id=None, sockets_metadata={}, send_sync=lambda *a: None
    )
    executor = execution.PromptExecutor(
        server,
        cache_type=execution.CacheType.CLASSIC,
        cache_args={"lru": 0, "ram": 0, "ram_inactive": 0},
    )
    checked = asyncio.run(_checked(graph))
    if not checked[0]:
        raise _refusal_before(checked)
    executor.execute(graph, "prompt", {}, checked[2])
    for event, details in executor.status_messages:
        if event == "execution_error":
            if details["exception_type"].rpartition(".")[2] == "EasyRefError":
                raise EasyRefError(details["exception_message"].strip())
            raise RuntimeError(f"{details['exception_message']}\n{''.join(details['traceback'])}")
    return dict(executor.history_result["outputs"])


async def _checked(graph: dict[str, Any]) -> Any:
    import execution

    return await execution.validate_prompt("prompt", graph, None)


def _refusal_before(checked: Any) -> Exception:
    """ComfyUI's answer to a graph that it does not run: the pack's sentence stands in details."""
    reasons = [
        (reason["type"], f"{reason['message']}: {reason['details']}")
        for node in checked[3].values()
        for reason in node["errors"]
    ]
    text = "\n".join(text for _, text in reasons)
    if len(reasons) == 1 and reasons[0][0] == "custom_validation_failed":
        return EasyRefError(reasons[0][1].partition(" - ")[2])
    if len(reasons) == 1 and reasons[0][0] == "value_not_in_list":
        return EasyRefError(f"{text}.")  # ComfyUI's own sentence about a choice
    return RuntimeError(text or str(checked[1]))


def choices(base: str) -> Any:
    """The pack starts, and every node lists its choices, as at ComfyUI's start and at a reload."""
    use_home(base)
    module = sys.modules[comfyhost.NAME]
    extension = asyncio.run(module.comfy_entrypoint())
    found = asyncio.run(extension.get_node_list())
    listed: dict[str, Any] = {}
    for node in found:
        name = node.GET_SCHEMA().node_id
        listed[name] = node.GET_NODE_INFO_V1()["input"]
        node.INPUT_TYPES()
    return {
        "nodes": len(listed),
        "adapters": _options(listed["EasyRefLoader"]["required"]["adapter"]),
        "mllms": _options(listed["EasyRefLoader"]["required"]["mllm"]),
        "tokens": _options(listed["EasyRefLoadTokens"]["required"]["file"]),
    }


def _options(given: Any) -> list[str]:
    return list(given[0] if isinstance(given[0], list) else given[1]["options"])


# Routes


def route(
    base: str,
    method: str,
    address: str,
    headers: dict[str, str] | None = None,
    body: str = "",
    repeat: int = 1,
) -> Any:
    """One request over HTTP, its body in Latin-1 and repeated. A refusal is a status of 400 to 499
    with a sentence."""
    use_home(base)
    content = body.encode("latin-1") * repeat
    status, text = asyncio.run(_request(method, address, headers or {}, content))
    if 400 <= status < 500:
        raise EasyRefError(_sentence(text))
    if status != 200:
        raise RuntimeError(f"status {status}: {text[:2000]}")
    return {"status": status, "bytes": len(text)}


def _sentence(text: str) -> str:
    try:
        return json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        # aiohttp's own words, such as "400: Bad Request"
        return f"The server answers: {' '.join(text.split())}."


async def _request(
    method: str, address: str, headers: dict[str, str], body: bytes
) -> tuple[int, str]:
    app = web.Application(client_max_size=100 * 2**20)  # ComfyUI's default
    app.add_routes(sys.modules["server"].PromptServer.instance.routes)
    runner = web.AppRunner(app, handle_signals=False)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with (
        ClientSession() as session,
        session.request(
            method,
            f"http://127.0.0.1:{port}{address}",
            headers=headers,
            data=body or None,
            skip_auto_headers=("Content-Type",),
        ) as response,
    ):
        return response.status, (await response.read()).decode("latin-1")


def thumbnail(base: str, file: str = "picture.png") -> Any:
    return route(base, "GET", f"/easyref/thumbnail?file={quote(file)}&side=256")


def folders(base: str) -> Any:
    return route(base, "GET", "/easyref/folders")
