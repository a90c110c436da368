"""EasyRef Inspect: heat maps, report and preview of the attention while encoding a group."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from comfyhost import Pack
from goldens import IMAGE_SIZE, pictures, user_prompt
from PIL import Image

CASE = "four_refs_prompt"


@pytest.fixture
def group(pack: Pack) -> Any:
    reference = pack.part("easyref_core.encode.group").Reference
    return tuple(reference(p, name=f"image_{n}") for n, p in enumerate(pictures(CASE), start=1))


def inspect(pack: Pack, easyref: Any, **settings: Any) -> Any:
    """The node's whole result, for the golden group's prompt and size."""
    given = {"prompt": user_prompt(CASE), "image_size": IMAGE_SIZE}
    return pack.nodes["EasyRefInspect"].execute(easyref, **(given | settings))


def share(line: str) -> float:
    return float(line.split(": ")[1].split(" %")[0])


def test_a_card_and_a_line_for_every_reference(pack: Pack, easyref: Any, group: Any) -> None:
    result = inspect(pack, easyref, references=group)
    heat_maps, report = result[0], result[1]
    assert heat_maps.shape == (4, 644, 512, 3)
    assert heat_maps.dtype == torch.float32
    assert 0 <= float(heat_maps.min()) < float(heat_maps.max()) <= 1
    lines = report.splitlines()
    assert [line.split(":")[0] for line in lines[:4]] == [f"{n}. image_{n}" for n in range(1, 5)]
    everything = sum(share(line) for line in lines if not line.startswith("all references"))
    assert everything == pytest.approx(100, abs=0.4)  # each is rounded
    assert sum(map(share, lines[:4])) == pytest.approx(share(lines[4]), abs=0.2)


def test_the_node_shows_both(pack: Pack, easyref: Any, group: Any) -> None:
    result = inspect(pack, easyref, references=group[:2])
    assert result.ui["text"] == (result[1],)
    files = result.ui["images"]
    assert [file["type"] for file in files] == ["temp", "temp"]
    with Image.open(pack.base / "temp" / files[0]["subfolder"] / files[0]["filename"]) as shown:
        assert shown.size == (512, 644)
    assert pack.nodes["EasyRefInspect"].GET_SCHEMA().is_output_node


def test_images_come_before_references(pack: Pack, easyref: Any, group: Any) -> None:
    batch = torch.rand((2, 30, 40, 3), generator=torch.Generator().manual_seed(1))
    lines = inspect(pack, easyref, images=batch, references=group[:1])[1].splitlines()
    assert lines[0].startswith("1. images (picture 1): ")
    assert lines[2].startswith("3. image_1: ")


def test_a_references_weight_is_used(pack: Pack, easyref: Any, group: Any) -> None:
    plain = inspect(pack, easyref, references=group)[1].splitlines()
    given = (replace(group[0], weight=0.0), replace(group[1], weight=5.0), *group[2:])
    found = inspect(pack, easyref, references=given)[1].splitlines()
    assert share(found[0]) == 0
    assert share(found[1]) > share(plain[1])


@pytest.mark.keeps
def test_after_encoding_no_picture_is_encoded_again(
    pack: Pack, fresh_easyref: Any, group: Any
) -> None:
    given = {"references": group, "aggregation": "easyref"}
    pack.run("EasyRefEncode", fresh_easyref, prompt="", image_size=IMAGE_SIZE, **given)
    looks: list[Any] = []
    visual = fresh_easyref.encoder.patcher.model.multimodal_llm.visual
    handle = visual.register_forward_hook(lambda *args: looks.append(args))
    inspect(pack, fresh_easyref, references=group)
    handle.remove()
    assert not looks


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_gives_about_the_same_shares(
    pack: Pack, easyref: Any, group: Any, precision: str
) -> None:
    half = pack.run("EasyRefLoader", "golden.safetensors", "golden", precision)
    pairs = zip(
        inspect(pack, half, references=group)[1].splitlines(),
        inspect(pack, easyref, references=group)[1].splitlines(),
        strict=True,
    )
    for found, expected in pairs:
        assert share(found) == pytest.approx(share(expected), abs=1.0)


def test_out_of_memory_is_reported_and_frees_everything(
    pack: Pack, fresh_easyref: Any, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm

    def run_out(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(pack.part("nodes.host.encoder"), "inspect_references", run_out)
        with pack.refused("Not enough memory", "4 references"):
            inspect(pack, fresh_easyref, references=group)
    assert fresh_easyref.encoder.patcher is None
    assert mm.current_loaded_models == []
    assert inspect(pack, fresh_easyref, references=group)[0].isfinite().all()


def test_what_cannot_be_encoded_cannot_be_inspected(pack: Pack, easyref: Any) -> None:
    with pack.refused("There is no reference picture"):
        inspect(pack, easyref)
    with pack.refused("image_size is 28"):
        inspect(pack, easyref, images=torch.rand(1, 8, 8, 3), image_size=28)
