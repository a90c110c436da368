"""ComfyUI in process, once a session; where there is none, every test here is skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfyhost
import dynamic_vram
import pytest
import score_models
import torch
from attention_spy import Spy
from comfyhost import ADAPTER_ONLY, CLIP_MODEL, DINO_MODEL, GOLDEN, GOLDEN_MLLM, Pack
from goldens import ADAPTER, BODY, MLLM, adapter_tensors, without, write

from workshop.comfyui.find_comfyui import find_comfyui


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without ComfyUI the tests here are still collected, so that it shows how many are missing."""
    if find_comfyui() is not None:
        return
    skip = pytest.mark.skip(
        reason="no ComfyUI: set COMFYUI_PATH, or run python -m workshop.comfyui.find_comfyui"
    )
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """ComfyUI's source."""
    result = find_comfyui()
    assert result is not None
    return result


@pytest.fixture(scope="session")
def pack(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """The pack inside ComfyUI, with the golden models in its folders."""
    base = tmp_path_factory.mktemp("comfyui")
    for folder in ("models/easyref", "models/LLM", "models/easyref_tokens", "custom_nodes"):
        (base / folder).mkdir(parents=True)
    for folder in ("input", "output", "temp"):
        (base / folder).mkdir()
    os.symlink(ADAPTER, base / "models/easyref" / GOLDEN)
    os.symlink(MLLM, base / "models/LLM" / GOLDEN_MLLM)
    score_models.write_clip(base / "models/easyref_score" / CLIP_MODEL)
    score_models.write_dinov2(base / "models/easyref_score" / DINO_MODEL)
    write(base / "models/easyref" / ADAPTER_ONLY, without(adapter_tensors(), BODY))
    try:
        return comfyhost.start(comfyui, base)
    except ImportError as error:
        pytest.skip(f"ComfyUI in {comfyui} cannot be imported: {error}")


@pytest.fixture(autouse=True)
def _as_in_a_run(pack: Pack) -> Iterator[None]:
    """Every test runs in inference mode, as ComfyUI runs nodes, clears interrupts, and starts as a
    new server, which has encoded nothing.

    One thread, because models this small only wait for each other's threads on a busy computer.
    """
    import comfy.model_management as mm

    pack.part("nodes.host.encoder")._tokens.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)
    mm.interrupt_current_processing(False)


@pytest.fixture
def gpu(pack: Pack) -> Iterator[dynamic_vram.Gpu]:
    """ComfyUI with dynamic VRAM on a stand-in for a GPU; see `dynamic_vram`."""
    if not dynamic_vram.is_supported():
        pytest.skip(dynamic_vram.TOO_OLD)
    with dynamic_vram.dynamic_vram() as stand_in:
        yield stand_in


@pytest.fixture
def plain_gpu(pack: Pack) -> Iterator[dynamic_vram.Gpu]:
    """The same GPU without dynamic VRAM, as on older cores."""
    with dynamic_vram.dynamic_vram(dynamic=False) as stand_in:
        yield stand_in


@pytest.fixture(scope="session")
def easyref(pack: Pack) -> Any:
    """The golden adapter with the golden MLLM, as the Loader gives it."""
    return pack.run("EasyRefLoader", GOLDEN, GOLDEN_MLLM, "auto")


@pytest.fixture
def fresh_easyref(pack: Pack) -> Any:
    """The same, for tests that watch or break it."""
    return pack.run("EasyRefLoader", GOLDEN, GOLDEN_MLLM, "auto")


@pytest.fixture(scope="session")
def tokens(pack: Pack, easyref: Any) -> Any:
    """The golden reference tokens."""
    return pack.part("easyref_core.tokens.reference_tokens").ReferenceTokens(
        comfyhost.golden("unet.ref_tokens"),
        comfyhost.golden("unet.uncond_ref_tokens"),
        easyref.checkpoint.identity,
        easyref.checkpoint.name,
    )


@pytest.fixture
def unet(pack: Pack) -> Any:
    """The golden UNet as a MODEL that no other test shares."""
    return comfyhost.golden_unet(pack)


@pytest.fixture(scope="session")
def demo(pack: Pack) -> Any:
    """The demo models; their UNet has SDXL's blocks, at two attention resolutions."""
    return pack.part("nodes.host.demo_models").load_demo_set()


@pytest.fixture(scope="session")
def demo_easyref(pack: Pack, demo: Any) -> Any:
    """The demo adapter, as the demo node gives it."""
    easyref_model = pack.part("nodes.link_types").EasyRefModel
    return easyref_model.of(demo.adapter_file, demo.mllm_directory)


@pytest.fixture
def spy(pack: Pack, easyref: Any, unet: Any) -> Spy:
    return Spy(pack, easyref, unet)


@pytest.fixture
def model(pack: Pack, spy: Spy, unet: Any, easyref: Any, tokens: Any) -> Any:
    """The golden model, steered and watched."""
    return spy.watch(comfyhost.apply(pack, unet, easyref, tokens))


@pytest.fixture
def truth(tokens: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each text with the reference tokens that belong to it."""
    return [
        (comfyhost.text()[0][0], tokens.cond),
        (comfyhost.text("negative")[0][0], tokens.uncond),
    ]
