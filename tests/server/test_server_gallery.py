"""The gallery on a real server: its routes, its errors, and files that change."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from server_graphs import REFERENCES, pixels, small

from workshop.comfyui.comfy_client import ComfyUIError
from workshop.comfyui.comfy_server import ComfyServer
from workshop.demo.workflow import Graph, set_inputs

FOLDER = "gallery test"


@pytest.fixture
def folder(server: ComfyServer) -> Iterator[Path]:
    """A subfolder of the server's input with two pictures, emptied afterwards."""
    path = server.base / "input" / FOLDER
    path.mkdir()
    for name, colour in (("ü 2.png", "red"), ("ü 10.png", "blue")):
        Image.new("RGB", (400, 200), colour).save(path / name)
    yield path
    for child in path.iterdir():
        child.unlink()
    path.rmdir()


def text(*files: str, version: int = 1) -> str:
    return json.dumps({"version": version, "pictures": [{"file": file} for file in files]})


def with_gallery(gallery: str) -> Graph:
    """The template without connected pictures."""
    graph = set_inputs(small(), "EasyRefReferences", gallery=gallery)
    for node in graph.values():
        if node["class_type"] == "EasyRefReferences":
            node["inputs"] = {
                name: value
                for name, value in node["inputs"].items()
                if not name.startswith("images.")
            }
    return graph


def ask(server: ComfyServer, path: str, **query: Any) -> Any:
    return server.get_json(f"/easyref/{path}?{urllib.parse.urlencode(query)}")


def test_folders_and_pictures_are_listed(server: ComfyServer, folder: Path) -> None:
    assert {"folder": FOLDER, "pictures": 2} in ask(server, "folders")["folders"]
    wanted = [f"{FOLDER}/ü 2.png", f"{FOLDER}/ü 10.png"]
    assert ask(server, "pictures", folder=FOLDER) == {"pictures": wanted, "found": 2}
    assert ask(server, "pictures")["found"] >= 1


@pytest.mark.parametrize("name", ["absent", "..", "/", "../output", "C:\\"])
def test_only_folders_of_the_input_are_listed(server: ComfyServer, name: str) -> None:
    if name == "/":
        assert ask(server, "pictures", folder=name) == ask(server, "pictures")
        return
    with pytest.raises(ComfyUIError, match=r"input folder|There is no folder"):
        ask(server, "pictures", folder=name)


def test_stamps_change_with_the_file_and_are_empty_for_other_paths(
    server: ComfyServer, folder: Path
) -> None:
    files = [f"{FOLDER}/ü 2.png", "absent.png", "../models", FOLDER, 5]
    first, *others = server.post_json("/easyref/stamps", {"files": files})["stamps"]
    assert first
    assert others == ["", "", "", ""]
    Image.new("RGB", (41, 20), "red").save(folder / "ü 2.png")
    assert server.post_json("/easyref/stamps", {"files": files[:1]})["stamps"] != [first]
    for wrong in ([], {}, {"files": "a.png"}):
        with pytest.raises(ComfyUIError, match="files"):
            server.post_json("/easyref/stamps", wrong)


def test_thumbnails_are_scaled_and_cropped_and_bad_queries_are_refused(
    server: ComfyServer, folder: Path
) -> None:
    def thumbnail(**query: Any) -> Image.Image:
        query = {"file": f"{FOLDER}/ü 2.png", "side": 100, **query}
        content = server.get(f"/easyref/thumbnail?{urllib.parse.urlencode(query)}")
        return Image.open(io.BytesIO(content))

    assert thumbnail().size == (100, 50)
    assert thumbnail(crop="0,0,0.25,1").size == (50, 100)
    (folder / "notes.txt").write_text("no picture")
    for wrong in (
        {"file": "../models/x.png"},
        {"file": "absent.png"},
        {"file": ""},
        {"file": f"{FOLDER}/notes.txt"},
        {"file": "x" * 3000 + ".png"},
        {"side": "9" * 5000},
        {"side": "²"},
        {"crop": "[" * 5000},
        {"side": 9999},
        {"side": "x"},
        {"crop": "0,0"},
        {"crop": "x"},
    ):
        with pytest.raises(ComfyUIError):
            thumbnail(**wrong)


def test_formats_are_told_by_how_files_begin(server: ComfyServer) -> None:
    heads = [b"\xff\xd8\xff\xe0", b"\0\0\0\x18ftypheic", b"text", b""]
    asked = {"heads": [base64.b64encode(head).decode() for head in heads]}
    assert server.post_json("/easyref/formats", asked)["formats"] == [
        {"name": "JPEG", "readable": True},
        {"name": "HEIC", "readable": False},
        None,
        None,
    ]
    for wrong in ({"heads": ["?"]}, {"heads": [5]}, {"heads": [None]}, {"heads": ["a"]}):
        with pytest.raises(ComfyUIError, match="is not base64"):
            server.post_json("/easyref/formats", wrong)


@pytest.mark.parametrize("route", ["stamps", "formats"])
@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"[" * 100_000, {}),
        (b"{}", {"Content-Type": "application/json; charset=nonsense"}),
        (b"{}", {"Content-Type": "application/json; charset=utf-16"}),
        (b"no gzip", {"Content-Encoding": "gzip"}),
        (gzip.compress(b"[]" * 100, mtime=0)[:-20], {"Content-Encoding": "gzip"}),
        (b"\xff\xfe", {}),
        (b"", {}),
        (b" " * 5_000_000, {}),
        (gzip.compress(b" " * 50_000_000, mtime=0), {"Content-Encoding": "gzip"}),
        (b'{"files": "a", "heads": "a"}', {}),
        (b'{"files": 5, "heads": {}}', {}),
        (json.dumps({"files": [""] * 3000, "heads": [""] * 3000}).encode(), {}),
    ],
)
def test_malformed_requests_are_refused(
    server: ComfyServer, route: str, body: bytes, headers: dict[str, str]
) -> None:
    request = urllib.request.Request(f"{server.url}/easyref/{route}", body, headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    assert 400 <= caught.value.code < 500
    assert ask(server, "folders")["folders"]


def test_pipes_among_the_pictures_are_neither_listed_nor_waited_for(
    server: ComfyServer, folder: Path
) -> None:
    for name in ("p.png", "q.png", "r.png"):
        os.mkfifo(folder / name)
        with pytest.raises(ComfyUIError, match="pipe"):
            server.get(f"/easyref/thumbnail?{urllib.parse.urlencode({'file': f'{FOLDER}/{name}'})}")
    assert ask(server, "pictures", folder=FOLDER)["found"] == 2
    assert server.get(f"/easyref/thumbnail?{urllib.parse.urlencode({'file': REFERENCES[0]})}")


def test_a_gallery_gives_the_same_result_as_connected_images(server: ComfyServer) -> None:
    assert (pixels(server, with_gallery(text(*REFERENCES))) == pixels(server, small())).all()


def test_a_changed_file_runs_the_node_again(server: ComfyServer, folder: Path) -> None:
    graph = with_gallery(text(f"{FOLDER}/ü 2.png"))
    before = pixels(server, graph)
    nodes = [name for name, node in graph.items() if node["class_type"] == "EasyRefReferences"]
    assert set(nodes) <= server.run(graph).cached
    Image.new("RGB", (400, 200), "green").save(folder / "ü 2.png")
    assert (pixels(server, graph) != before).any()


@pytest.mark.parametrize(
    ("gallery", "message"),
    [
        (text("absent 1.png", REFERENCES[0], "absent 2.png"), "'absent 1.png', 'absent 2.png'"),
        (text("../../secret.png"), "leads out of ComfyUI's input folder"),
        (text("x.png", version=2), "newer EasyRef"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_gallery_that_cannot_be_read_is_refused_before_the_run(
    server: ComfyServer, gallery: str, message: str
) -> None:
    with pytest.raises(ComfyUIError) as caught:
        server.queue(with_gallery(gallery))
    assert message in str(caught.value)


def test_a_weight_out_of_range_is_still_refused_by_comfyui(server: ComfyServer) -> None:
    graph = set_inputs(with_gallery(text(*REFERENCES)), "EasyRefReferences", weight=9.0)
    with pytest.raises(ComfyUIError, match="bigger than max"):
        server.queue(graph)


def test_a_group_without_any_picture_is_refused(server: ComfyServer) -> None:
    with pytest.raises(ComfyUIError, match="EasyRef References has no picture"):
        server.run(with_gallery(""))
