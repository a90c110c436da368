"""An adapter file is recognised by its keys and shapes, in every layout that is known."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import goldens
import pytest
import torch
from goldens import BODY, Tensors

from easyref_core.adapter.checkpoint import AdapterCheckpoint, load_checkpoint
from easyref_core.cli import main
from easyref_core.encode.plan_encoder import plan_encoder
from easyref_core.qwen2vl.config import MllmConfig

HEAD, EMBEDDING = BODY + "lm_head.weight", BODY + "model.embed_tokens.weight"
LORA = "_lora."


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Tensors], AdapterCheckpoint]:
    numbers = itertools.count()

    def write(tensors: Tensors) -> AdapterCheckpoint:
        path = tmp_path / f"adapter_{next(numbers)}.safetensors"
        return load_checkpoint(goldens.write(path, tensors))

    return write


def built(found: AdapterCheckpoint, directory: Path | None = None) -> Tensors:
    return plan_encoder(found, directory).build().state_dict()


def test_report_of_the_golden_adapter(checkpoint: AdapterCheckpoint) -> None:
    report = checkpoint.report()
    identity = report.pop("identity")
    assert len(identity) == 16
    assert int(identity, 16) >= 0
    assert report == {
        "file": str(goldens.ADAPTER),
        "bytes": goldens.ADAPTER.stat().st_size,
        "format": "safetensors",
        "image_size": 336,
        "reference_tokens": 16,
        "token_width": 96,
        "mllm_width": 64,
        "final_layers": 1,
        "cross_attention_layers": 8,
        "lora_layers": 16,
        "lora_rank": 4,
        "identity_lora_layers": 0,
        "identity_lora_rank": 0,
        "layer_pooling": [],
        "mllm_layers": None,
        "dtype": "float32",
        "mllm_inside": True,
        "mllm_dtype": "float32",
        "mllm_tensors": 69,  # 70 keys, of which the output head serves as the embedding's twin
        "embedding_keys": [HEAD, EMBEDDING],
        "base_unet_tensors": 0,
        "ignored_tensors": 0,
    }


def test_every_golden_key_is_used(checkpoint: AdapterCheckpoint) -> None:
    keys = json.loads((goldens.GOLDEN / "checkpoint_keys.json").read_text(encoding="utf-8"))
    sources = set(plan_encoder(checkpoint, goldens.MLLM).sources)
    unet = {name for parts in checkpoint.cross_attention.values() for name in parts.values()}
    unet |= {
        name
        for parts in checkpoint.lora.values()
        for halves in parts.values()
        for name in halves.values()
    }
    assert sources | unet | {HEAD} == set(keys)


def test_without_the_mllm(adapter_only: AdapterCheckpoint) -> None:
    report = adapter_only.report()
    assert (report["mllm_inside"], report["mllm_tensors"], report["mllm_dtype"]) == (False, 0, None)
    assert report["reference_tokens"] == 16
    with goldens.refused("adapter_only.safetensors", "does not carry the MLLM", "directory"):
        plan_encoder(adapter_only)


def test_without_lora(whole: Tensors, save: Callable) -> None:
    report = save(goldens.without(whole, LORA)).report()
    assert (report["lora_layers"], report["lora_rank"]) == (0, 0)
    assert report["cross_attention_layers"] == len(goldens.LAYERS)


@pytest.mark.parametrize("kept", [EMBEDDING, HEAD, "both"])
def test_word_embedding_and_output_head_are_tied(whole: Tensors, save: Callable, kept: str) -> None:
    tensors = goldens.without(whole, EMBEDDING)
    for name in (EMBEDDING, HEAD):
        if kept in (name, "both"):
            tensors[name] = whole[EMBEDDING].clone()
    found = save(tensors)
    names = {EMBEDDING, HEAD} if kept == "both" else {kept}
    assert set(found.report()["embedding_keys"]) == names
    assert torch.equal(built(found)[EMBEDDING], whole[EMBEDDING])


def test_missing_embedding_is_named_without_a_directory(whole: Tensors, save: Callable) -> None:
    found = save(goldens.without(whole, EMBEDDING))
    with goldens.refused("1 weights are missing", EMBEDDING, "lm_head.weight", "directory"):
        plan_encoder(found)


def test_missing_embedding_is_filled_from_the_directory(
    whole: Tensors, save: Callable, tmp_path: Path
) -> None:
    base = {"model.embed_tokens.weight": torch.full((448, 128), 0.5)}
    base["model.norm.weight"] = torch.full((128,), 7.0)
    directory = goldens.mllm_directory(tmp_path / "mllm", weights=base)
    state = built(save(goldens.without(whole, EMBEDDING)), directory)
    assert torch.equal(state[EMBEDDING], base["model.embed_tokens.weight"])
    norm = BODY + "model.norm.weight"
    assert torch.equal(state[norm], whole[norm])  # the adapter's own comes first


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "adapter.safetensors", "no_suffix"])
@pytest.mark.parametrize("zipped", [True, False])
def test_deepspeed_file_under_any_name(
    whole: Tensors, save: Callable, tmp_path: Path, name: str, zipped: bool
) -> None:
    expected = save(whole)
    path = tmp_path / "deepspeed" / name
    path.parent.mkdir()
    content = {"module": whole, "global_steps": 3, "dp_world_size": 8}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = load_checkpoint(path)
    assert found.report()["format"] == "pytorch"
    assert found.identity == expected.identity
    assert found.name == name
    state = built(found)
    assert all(torch.equal(t, state[n]) for n, t in built(expected).items())


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "ip-adapter.ckpt", "adapter"])
def test_safetensors_under_a_misleading_name(
    checkpoint: AdapterCheckpoint, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(goldens.ADAPTER.read_bytes())
    found = load_checkpoint(path)
    assert found.report()["format"] == "safetensors"
    assert found.identity == checkpoint.identity


def test_base_unet_weights_and_duplicates_are_reported_and_left_out(
    whole: Tensors, save: Callable
) -> None:
    unet = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    stray = {
        f"{unet}.to_q.weight": torch.zeros(2, 2),
        "unet.conv_in.weight": torch.zeros(2, 2),
        "adapter_modules.1.to_k_ip.weight": torch.zeros(2, 2),
        "adapter_modules.1.to_v_ip.weight": torch.zeros(2, 2),
        "adapter_modules.0.to_q_lora.up.weight": torch.zeros(2, 2),
    }
    plain, found = save(whole).report(), save(whole | stray)
    report = found.report()
    assert (report["base_unet_tensors"], report["ignored_tensors"]) == (2, 3)
    changed = {"base_unet_tensors", "ignored_tensors", "bytes", "file"}
    assert all(report[n] == value for n, value in plain.items() if n not in changed)
    assert stray.keys().isdisjoint(plan_encoder(found).sources)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_newer_key_layout_and_module_prefix(whole: Tensors, save: Callable, prefix: str) -> None:
    plain = save(whole)
    renamed = {prefix + n: t for n, t in goldens.newer_layout(whole).items()}
    assert any("model.language_model.layers." in n for n in renamed)
    found = save(renamed)
    assert found.report()["mllm_tensors"] == plain.report()["mllm_tensors"]
    assert found.identity == plain.identity
    state, again = built(plain), built(found)
    assert again.keys() == state.keys()
    assert all(torch.equal(t, again[n]) for n, t in state.items())


def test_a_weight_under_the_names_of_two_layouts_is_refused(whole: Tensors, save: Callable) -> None:
    name, newer = "model.norm.weight", "model.language_model.norm.weight"
    with goldens.refused(name, newer):
        save(whole | {BODY + newer: whole[BODY + name].clone()})


def test_identity_does_not_depend_on_the_mllm_inside_nor_the_name(
    checkpoint: AdapterCheckpoint, adapter_only: AdapterCheckpoint
) -> None:
    assert checkpoint.name != adapter_only.name
    assert checkpoint.identity == adapter_only.identity


def test_a_weight_that_is_a_single_number_has_an_identity_too(
    whole: Tensors, save: Callable
) -> None:
    other = {**whole, "image_proj_model.extra": torch.tensor(1.0)}
    assert save(whole).identity != save(other).identity


@pytest.mark.parametrize(
    "name",
    [
        "mllm_final_layer.reference_tokens",
        "image_proj_model.proj.0.weight",
        "image_proj_model.proj.0.bias",
        "image_proj_model.proj.2.weight",
        "image_proj_model.proj.2.bias",
        "image_proj_model.proj.3.weight",
        "image_proj_model.proj.3.bias",
        *(f"unet.{layer}.processor.to_{kv}_ip.weight" for layer in goldens.LAYERS for kv in "kv"),
    ],
)
def test_identity_tells_adapters_apart(whole: Tensors, save: Callable, name: str) -> None:
    other = dict(whole)
    other[name] = whole[name].clone()
    other[name][0] += 0.01
    assert save(whole).identity != save(other).identity


@pytest.mark.parametrize("lora", [True, False])
def test_released_size_is_recognised_from_keys_alone(tmp_path: Path, lora: bool) -> None:
    shapes = goldens.real_shapes(lora)
    found = load_checkpoint(goldens.sparse_file(tmp_path / "real", shapes))
    report = found.report()
    wanted = {
        "reference_tokens": 64,
        "token_width": 2048,
        "mllm_width": 1536,
        "final_layers": 1,
        "cross_attention_layers": 70,
        "lora_layers": 140 if lora else 0,
        "lora_rank": 128 if lora else 0,
        "dtype": "bfloat16",
        "mllm_inside": True,
        "mllm_tensors": 717,
        "ignored_tensors": 0,
    }
    assert {n: report[n] for n in wanted} == wanted
    plan = plan_encoder(found)
    assert plan.config == MllmConfig()  # the defaults are Qwen2-VL-2B's


def test_inspect_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(goldens.ADAPTER)]) == 0
    out = capsys.readouterr().out
    rows = dict(line.split("  ", 1) for line in out.splitlines())
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["reference tokens"] == "16"
    assert rows["image size"] == "336"
    assert rows["mllm inside"] == "yes"
    assert rows["embedding keys"] == f"{HEAD}, {EMBEDDING}"


@pytest.mark.parametrize("said", ["112px", "", "55", "-112"])
def test_a_damaged_image_size_is_refused(tmp_path: Path, said: str) -> None:
    path = goldens.write(tmp_path / "a.safetensors", goldens.adapter_tensors(), image_size=said)
    with goldens.refused(str(path), f"image_size {said!r}", "56"):
        load_checkpoint(path)


def test_inspect_as_json(capsys: pytest.CaptureFixture[str], checkpoint: AdapterCheckpoint) -> None:
    assert main(["inspect", "--json", str(goldens.ADAPTER)]) == 0
    assert json.loads(capsys.readouterr().out) == checkpoint.report()
