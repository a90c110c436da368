"""The pack in a running ComfyUI: nodes, templates, help pages, start-up time, log, interrupts."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from server_graphs import pixels, small

from workshop.comfyui.comfy_client import ComfyUIError
from workshop.comfyui.comfy_server import PACK_NAME, ComfyServer
from workshop.demo.workflow import set_inputs

TEMPLATE = "easyref_character"


def node_ids(pack: Path) -> set[str]:
    """The node ids in the pack's source."""
    sources = [path.read_text(encoding="utf-8") for path in (pack / "nodes").glob("*.py")]
    return {node_id for text in sources for node_id in re.findall(r'node_id="(\w+)"', text)}


def test_every_node_is_registered_with_category_and_description(
    server: ComfyServer, pack: Path
) -> None:
    expected = node_ids(pack)
    assert expected >= {"EasyRefLoader", "EasyRefEncode", "EasyRefApply"}
    object_info = server.get_json("/object_info")
    assert expected <= object_info.keys()
    for node in sorted(expected):
        assert object_info[node]["category"].split("/")[0] == "EasyRef"
        assert object_info[node]["description"]
        assert object_info[node]["python_module"] == f"custom_nodes.{PACK_NAME}"


def test_importing_the_pack_takes_under_two_seconds(server: ComfyServer) -> None:
    match = re.search(rf"([\d.]+) seconds( \(IMPORT FAILED\))?: .*{PACK_NAME}\s", server.log)
    assert match is not None
    assert match.group(2) is None
    # Usually well under a second; compiling the files on a busy machine takes longer, and one
    # heavy import takes several seconds.
    assert float(match.group(1)) < 2


def test_starting_and_running_log_no_errors(server: ComfyServer) -> None:
    started = server.log[: server.log.index("To see the GUI go to")]
    before = len(server.log)
    server.run(small(seed=11))
    for text in (started, server.log[before:]):
        assert "Traceback" not in text
        assert "IMPORT FAILED" not in text
        assert "lora key not loaded" not in text


def test_templates_are_listed_and_served_with_their_picture(
    server: ComfyServer, pack: Path
) -> None:
    listed = server.get_json("/workflow_templates")[PACK_NAME]
    assert TEMPLATE in listed
    assert sorted(listed) == sorted(path.stem for path in (pack / "workflows").glob("*.json"))
    address = f"/api/workflow_templates/{PACK_NAME}/{TEMPLATE}"
    assert {"nodes", "links", "groups"} <= server.get_json(f"{address}.json").keys()
    thumbnail = Image.open(io.BytesIO(server.get(f"{address}.jpg")))
    assert thumbnail.format == "JPEG"
    assert min(thumbnail.size) >= 256


def test_every_help_page_is_served(server: ComfyServer, pack: Path) -> None:
    pages = sorted((pack / "web" / "docs").glob("*.md"))
    if not pages:
        pytest.skip("the pack has no help pages")
    assert node_ids(pack) <= {page.stem for page in pages}
    for page in pages:
        served = server.get(f"/extensions/{PACK_NAME}/docs/{page.name}")
        assert served.decode("utf-8") == page.read_text(encoding="utf-8")


def test_an_interrupted_run_leaves_the_next_one_clean(server: ComfyServer) -> None:
    clean = pixels(server, small(seed=12))
    long = set_inputs(small(seed=13, steps=2000), "EmptyLatentImage", width=256, height=256)
    prompt_id = server.queue(long)
    end = time.monotonic() + 30
    while not server.is_running(prompt_id) and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(1.0)  # until it samples
    server.interrupt()
    with pytest.raises(ComfyUIError) as caught:
        server.wait(prompt_id, 60)
    assert caught.value.interrupted
    assert np.array_equal(pixels(server, small(seed=12)), clean)
