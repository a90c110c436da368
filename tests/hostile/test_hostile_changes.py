"""A file that is cut off while it is in use ends neither the program nor the server."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from corpus import check_sentence
from fork_server import ForkServer, Outcome
from goldens import ADAPTER, BODY, MLLM, adapter_tensors, without, write
from homes import Home, make_home, replaced

from workshop.comfyui.find_comfyui import find_comfyui

FILES = {
    "adapter": ("models", "easyref", "adapter.safetensors"),
    "MLLM": ("models", "LLM", "mllm", "model.safetensors"),
}


@pytest.fixture(params=FILES)
def parts(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Where the file lies in the home."""
    return FILES[request.param]


@pytest.fixture
def home(tmp_path: Path, parts: tuple[str, ...]) -> Home:
    """A home whose files may be written; the MLLM's weights are read from its own folder."""
    home = make_home(tmp_path / "home")
    for path, source in (
        (home.adapter, ADAPTER),
        (home.mllm / "model.safetensors", MLLM / "model.safetensors"),
    ):
        shutil.copy(source, replaced(path))
    if parts == FILES["MLLM"]:
        write(replaced(home.adapter), without(adapter_tensors(), BODY))
    return home


def check(outcome: Outcome) -> None:
    assert outcome.kind in ("done", "refused"), outcome.text
    if outcome.kind == "refused":
        check_sentence(outcome.text)


def test_while_an_encoder_is_in_use(
    home: Home, parts: tuple[str, ...], fork_server: ForkServer
) -> None:
    outcome = fork_server.run("python_cut", home.base, *parts)
    check(outcome)
    assert outcome.kind == "refused" or outcome.value["difference"] < 1e-3


@pytest.mark.parametrize("after", ["loader", "tokens", "apply"])
def test_between_two_nodes(
    home: Home, parts: tuple[str, ...], after: str, fork_server: ForkServer
) -> None:
    if find_comfyui() is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH, or run python -m workshop.comfyui.find_comfyui")
    check(fork_server.run("comfy_entry_points.graph_cut", home.base, after, *parts))
