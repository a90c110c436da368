"""Saved tokens: the round trip without the MLLM, their adapter, and where files may go."""

from __future__ import annotations

import builtins
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyhost import (
    ADAPTER_ONLY,
    GOLDEN,
    GOLDEN_MLLM,
    NAME,
    Pack,
    apply,
    golden,
    predict,
    put_adapter,
    random_tokens,
    text,
)
from goldens import adapter_tensors, difference

FOLDERS = {"output": "output/easyref_tokens", "models": "models/easyref_tokens"}


def save(pack: Pack, tokens: Any, prefix: str, folder: str = "output") -> Path:
    """Save, and where the node says the file is."""
    result = pack.nodes["EasyRefSaveTokens"].execute(tokens, prefix, folder)
    return Path(result.ui["text"][0])


def name_of(pack: Pack, path: Path, folder: str) -> str:
    """The name under which Load Tokens lists a file."""
    name = path.relative_to(pack.base / FOLDERS[folder]).as_posix()
    return f"{name} [output]" if folder == "output" else name


def files(pack: Pack) -> set[Path]:
    """All files around ComfyUI's folders, to check what was written where."""
    return {p for p in pack.base.parent.rglob("*") if p.is_file()}


@contextmanager
def imports_of_the_pack() -> Iterator[set[str]]:
    """Top-level names of everything that the pack's own modules import meanwhile."""
    found: set[str] = set()
    original = builtins.__import__

    def noted(name: str, globals: Any = None, *args: Any, **kwargs: Any) -> Any:
        if str((globals or {}).get("__name__", "")).startswith(NAME):
            found.add(name.split(".")[0])
        return original(name, globals, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "__import__", noted)
        yield found


@pytest.mark.parametrize("folder", list(FOLDERS))
def test_saved_tokens_are_loaded_bit_for_bit_with_their_history(
    pack: Pack, tokens: Any, folder: str
) -> None:
    from dataclasses import replace

    given = replace(tokens, prompt='a "quoted" cat\nüber 猫', num_references=4)
    path = save(pack, given, "round trip", folder)
    assert path.is_relative_to(pack.base / FOLDERS[folder])
    found = pack.run("EasyRefLoadTokens", name_of(pack, path, folder))
    assert torch.equal(found.cond, tokens.cond)
    assert torch.equal(found.uncond, tokens.uncond)
    for field in ("adapter", "adapter_name", "prompt", "num_references", "aggregation"):
        assert getattr(found, field) == getattr(given, field)


def test_applying_saved_tokens_never_loads_the_mllm(pack: Pack, unet: Any, tokens: Any) -> None:
    path = save(pack, tokens, "no_mllm")
    with imports_of_the_pack() as imported:
        easyref = pack.run("EasyRefLoader", ADAPTER_ONLY, "from adapter", "auto")
        loaded = pack.run("EasyRefLoadTokens", name_of(pack, path, "output"))
        noise = predict(apply(pack, unet, easyref, loaded))
    assert difference(noise, golden("unet.noise_pred.scale_1.0")) < 1e-4
    assert easyref.encoder.patcher is None
    assert not imported & {"transformers", "diffusers", "einops", "tokenizers"}
    assert imported, "nothing was watched"


def test_only_encoding_needs_the_tokenizer(pack: Pack, fresh_easyref: Any) -> None:
    with imports_of_the_pack() as imported:
        pack.run(
            "EasyRefEncode", fresh_easyref, "a cat", "easyref", 84, images=torch.rand(1, 30, 40, 3)
        )
    assert "transformers" in imported
    assert fresh_easyref.encoder.patcher is not None


@pytest.fixture
def stranger(pack: Pack) -> Any:
    """An adapter of the same sizes with other weights."""
    tensors = adapter_tensors()
    tensors["image_proj_model.proj.0.bias"] += 1
    name = put_adapter(pack, "stranger.safetensors", tensors)
    return pack.run("EasyRefLoader", name, GOLDEN_MLLM, "auto")


def test_tokens_of_another_adapter_are_refused_by_both_names(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, stranger: Any
) -> None:
    name = name_of(pack, save(pack, tokens, "whose"), "output")
    own, other = easyref.checkpoint.identity, stranger.checkpoint.identity
    assert own != other
    loaded = pack.run("EasyRefLoadTokens", name)
    with pack.refused(own, other, GOLDEN, "stranger.safetensors"):
        apply(pack, unet, stranger, loaded)
    assert loaded.adapter == own


def test_tokens_of_the_same_adapter_without_its_mllm_are_accepted(
    pack: Pack, unet: Any, tokens: Any
) -> None:
    body = pack.run("EasyRefLoader", ADAPTER_ONLY, GOLDEN_MLLM, "auto")
    name = name_of(pack, save(pack, tokens, "either"), "output")
    noise = predict(apply(pack, unet, body, pack.run("EasyRefLoadTokens", name)))
    assert difference(noise, golden("unet.noise_pred.scale_1.0")) < 1e-4


@pytest.mark.parametrize("folder", list(FOLDERS))
@pytest.mark.parametrize(
    "prefix",
    [
        "../x",
        "../../x",
        "a/../../b",
        "..\\x",
        "a\\..\\..\\b",
        "..",
        "/etc/x",
        "/x",
        "\\x",
        "C:\\x",
        "C:x",
        "",
        "   ",
        ".",
        "/",
        "a/..",
        "a\0b",
    ],
)
def test_a_prefix_that_leads_outside_or_names_nothing_is_refused_and_nothing_written(
    pack: Pack, tokens: Any, prefix: str, folder: str
) -> None:
    before = files(pack)
    with pack.refused("filename_prefix", repr(prefix), pack.base / FOLDERS[folder]):
        save(pack, tokens, prefix, folder)
    assert files(pack) == before


def test_the_time_is_filled_in_as_in_save_image(pack: Pack, tokens: Any) -> None:
    path = save(pack, tokens, "%year%/%month%-%day% %hour%.%minute%.%second%")
    found = path.relative_to(pack.base / FOLDERS["output"]).as_posix()
    assert re.fullmatch(r"20\d\d/\d\d-\d\d \d\d\.\d\d\.\d\d_00001_\.safetensors", found)


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("a/%date:yyyy-MM-dd%", ("'%date:yyyy-MM-dd%'", "ComfyUI's page", "%year%, %month%")),
        ("%KSampler.seed%_x", ("'%KSampler.seed%'", "value of a node", "found none")),
        ("%width%x%height%", ("'%width%'", "size of a picture")),
    ],
)
def test_placeholders_that_nothing_fills_in_are_refused_by_name(
    pack: Pack, tokens: Any, prefix: str, said: tuple[str, ...]
) -> None:
    before = files(pack)
    with pack.refused("filename_prefix", prefix, *said):
        save(pack, tokens, prefix)
    assert files(pack) == before


def test_an_absolute_prefix_is_refused_even_inside(pack: Pack, tokens: Any) -> None:
    for folder in FOLDERS.values():
        with pack.refused("filename_prefix", pack.base / folder):
            save(pack, tokens, str(pack.base / folder / "x"), folder.split("/")[0])


@pytest.mark.parametrize("prefix", ["x" * 300, "y" * 300 + "/x"])
def test_a_name_too_long_for_the_disk_is_refused_and_nothing_written(
    pack: Pack, tokens: Any, prefix: str
) -> None:
    before = files(pack)
    with pack.refused("too long", "Choose another"):
        save(pack, tokens, prefix)
    assert files(pack) == before


def test_a_link_out_of_the_folder_is_not_followed(pack: Pack, tokens: Any, tmp_path: Path) -> None:
    base = pack.base / FOLDERS["models"]
    os.symlink(tmp_path, base / "way_out")
    try:
        with pack.refused("filename_prefix", "way_out/x"):
            save(pack, tokens, "way_out/x", "models")
    finally:
        (base / "way_out").unlink()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", list(FOLDERS))
@pytest.mark.parametrize(
    "prefix",
    [
        "plain",
        "two words",
        "a/b/c",
        "a\\d",
        "Ünïcode 猫 🐈",
        'it\'s "quoted"',
        "dots.in.name",
        "a+b&c;d",
        "100% cat 50%",
        "v1.5 at 10% and 2.5 at 20",
    ],
)
def test_every_other_name_can_be_saved_listed_and_loaded(
    pack: Pack, tokens: Any, prefix: str, folder: str
) -> None:
    path = save(pack, tokens, prefix, folder)
    assert path.is_file()
    name = name_of(pack, path, folder)
    assert name in pack.part("nodes.host.folders").token_names()
    assert pack.nodes["EasyRefLoadTokens"].validate_inputs(name) is True
    assert torch.equal(pack.run("EasyRefLoadTokens", name).cond, tokens.cond)


def test_the_number_grows_and_no_file_is_replaced(pack: Pack, easyref: Any) -> None:
    groups = [random_tokens(pack, easyref, seed) for seed in range(3)]
    paths = [save(pack, group, "sub/counted") for group in groups]
    assert [p.name for p in paths] == [f"counted_0000{n}_.safetensors" for n in (1, 2, 3)]
    for path, group in zip(paths, groups, strict=True):
        loaded = pack.run("EasyRefLoadTokens", name_of(pack, path, "output"))
        assert torch.equal(loaded.cond, group.cond)
    paths[0].unlink()
    assert save(pack, groups[0], "sub/counted").name == "counted_00004_.safetensors"
    assert save(pack, groups[0], "sub/counted_other").name == "counted_other_00001_.safetensors"


def test_the_node_shows_where_the_file_is(pack: Pack, tokens: Any) -> None:
    for folder, subfolder in (("output", "easyref_tokens/shown"), ("models", "shown")):
        ui = pack.nodes["EasyRefSaveTokens"].execute(tokens, "shown/it", folder).ui
        (entry,) = ui["tokens"]
        assert entry["subfolder"] == subfolder
        assert entry["type"] == folder
        assert Path(ui["text"][0]).name == entry["filename"]


@pytest.mark.parametrize(
    "name",
    [
        "nowhere.safetensors",
        "nowhere.safetensors [output]",
        "../easyref/golden.safetensors",
        "../../output/easyref_tokens/listed_00001_.safetensors",
        "../easyref_tokens/listed_00001_.safetensors [output]",
        "",
        " [output]",
        "sub/../listed_00001_.safetensors [output]",
    ],
)
def test_only_listed_files_are_loaded(pack: Pack, tokens: Any, name: str) -> None:
    save(pack, tokens, "listed")
    said = pack.nodes["EasyRefLoadTokens"].validate_inputs(name)
    assert isinstance(said, str)
    for part in (repr(name), pack.base / FOLDERS["output"], pack.base / FOLDERS["models"]):
        assert str(part) in said
    with pack.refused(repr(name)):
        pack.run("EasyRefLoadTokens", name)


def test_an_absolute_name_is_not_loaded(pack: Pack, tokens: Any) -> None:
    path = save(pack, tokens, "listed")
    for name in (str(path), f"{path} [output]"):
        with pack.refused(repr(name)):
            pack.run("EasyRefLoadTokens", name)


def test_a_foreign_or_damaged_file_in_the_folder_is_refused(pack: Pack, tokens: Any) -> None:
    whole = save(pack, tokens, "damaged", "models")
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) // 2])
    with pack.refused(whole, "cut off"):
        pack.run("EasyRefLoadTokens", whole.name)
    whole.write_bytes((pack.base / "models/easyref" / ADAPTER_ONLY).read_bytes())
    with pack.refused(whole, "does not hold EasyRef reference tokens"):
        pack.run("EasyRefLoadTokens", whole.name)


def test_a_changed_file_is_loaded_again(pack: Pack, easyref: Any) -> None:
    """ComfyUI runs the node again only when its fingerprint changes."""
    node = pack.nodes["EasyRefLoadTokens"]
    path = save(pack, random_tokens(pack, easyref, 1), "changing", "models")
    first = node.fingerprint_inputs(file=path.name)
    assert node.fingerprint_inputs(file=path.name) == first
    pack.part("easyref_core.tokens.reference_tokens").save_tokens(
        random_tokens(pack, easyref, 2), path, overwrite=True
    )
    os.utime(path, ns=(1, 1))
    assert node.fingerprint_inputs(file=path.name) != first
    assert node.fingerprint_inputs(file=path.name) != first


def test_tokens_of_an_mllm_with_other_numbers_are_refused(pack: Pack, unet: Any) -> None:
    """No weight tells the base of the positions; tokens made with another one are others."""
    folder = pack.base / "models" / "LLM" / "other_numbers"
    shutil.copytree(pack.base / "models" / "LLM" / GOLDEN_MLLM, folder)
    content = json.loads((folder / "config.json").read_text()) | {"rope_theta": 10_000.0}
    (folder / "config.json").write_text(json.dumps(content))
    right, wrong = (
        pack.run("EasyRefLoader", GOLDEN, mllm, "auto") for mllm in (GOLDEN_MLLM, folder.name)
    )
    images = torch.rand(1, 40, 40, 3)
    made = pack.run("EasyRefEncode", wrong, "", "easyref", 84, images=images)
    assert apply(pack, unet, wrong, made)
    with pack.refused("MLLM of another config.json", made.adapter):
        apply(pack, unet, right, made)
    carried = pack.run("EasyRefSetConditioning", text(), made, 1.0)
    model = apply(pack, unet, right, None)
    with pack.refused("A conditioning carries", made.adapter):
        predict(model, positive=carried)
