"""The encoder under dynamic VRAM, on a stand-in for the GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comfyhost import GOLDEN_MLLM, Pack, put_adapter
from dynamic_vram import META, Gpu
from goldens import IMAGE_SIZE, adapter_tensors, pictures, user_prompt

CASE = "four_refs_prompt"


@pytest.fixture
def half_file(pack: Pack) -> str:
    """The golden adapter in half precision."""
    return put_adapter(
        pack, "half_for_gpu.safetensors", {n: t.half() for n, t in adapter_tensors().items()}
    )


@pytest.fixture
def encode(pack: Pack, gpu: Gpu) -> Callable[..., Any]:
    """Encodes the golden group; the host may wait for its tokens."""
    group = pack.part("easyref_core.encode.group").Reference
    references = tuple(group(picture) for picture in pictures(CASE))

    def run(easyref: Any, node: str = "EasyRefEncode", **settings: Any) -> Any:
        given = {"prompt": user_prompt(CASE), "image_size": IMAGE_SIZE, "references": references}
        if node == "EasyRefEncode":
            given["aggregation"] = "easyref"
        with gpu.waiting_allowed():
            return pack.run(node, easyref, **(given | settings))

    return run


def tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def casting(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in model.named_modules():
        if hasattr(module, "comfy_cast_weights"):
            yield name, module


@pytest.mark.parametrize(
    ("precision", "wanted"),
    [("fp32", torch.float16), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_an_encoder_is_loaded_used_unloaded_and_loaded_again(
    pack: Pack,
    gpu: Gpu,
    half_file: str,
    encode: Callable[..., Any],
    precision: str,
    wanted: torch.dtype,
) -> None:
    """Weights are moved in the file's dtype and converted on the GPU."""
    import comfy.model_management as mm

    easyref = pack.run("EasyRefLoader", half_file, GOLDEN_MLLM, precision)
    with gpu.watch() as first:
        encode(easyref)
    patcher = easyref.encoder.patcher
    assert patcher.is_dynamic()
    assert patcher.load_device == META
    model = patcher.model
    assert [name for name, module in casting(model) if not hasattr(module, "_v")] == []
    layer = model.multimodal_llm.model.layers[0]
    assert layer.mlp.up_proj._v_weight.dtype == wanted
    assert len(first.file_reads) > len(list(casting(model))), "weights were read in advance"

    with gpu.watch() as second:
        encode(easyref, prompt="something else")
        encode(easyref, "EasyRefInspect")
    assert not second.file_reads

    mm.unload_all_models()
    assert not any(loaded.model is patcher for loaded in mm.current_loaded_models)
    assert [name for name, tensor in tensors(model) if tensor.is_meta] == []
    with gpu.watch() as again:
        encode(easyref, image_size=2 * IMAGE_SIZE)  # else the pictures are remembered
    assert easyref.encoder.patcher is patcher
    assert sorted(again.file_reads) == sorted(first.file_reads)


def test_an_adapter_in_shards_stays_in_its_files_too(
    pack: Pack, gpu: Gpu, half_file: str, encode: Callable[..., Any]
) -> None:
    folder = pack.base / "models" / "easyref"
    load = pack.part("easyref_core.adapter.checkpoint").load_checkpoint
    convert = pack.part("easyref_core.adapter.convert").convert_adapter
    index = convert(load(folder / half_file), folder / "parts.safetensors", max_shard_size="200KB")
    reads = []
    for name in (half_file, index.name):
        easyref = pack.run("EasyRefLoader", name, GOLDEN_MLLM, "fp32")
        with gpu.watch() as watched:
            encode(easyref)
        reads.append(len(watched.file_reads))
        assert easyref.encoder.patcher.is_dynamic()
    assert reads[0] == reads[1] > 0
    next(folder.glob("parts-00002-of-*")).touch()
    with pack.refused("parts-00002-of-", "has changed since it was loaded"):
        encode(easyref, prompt="something else")
    for path in folder.glob("parts*"):
        path.unlink()


def test_one_byte_weights_leave_biases_as_they_are(
    pack: Pack,
    gpu: Gpu,
    half_file: str,
    encode: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Qwen2's biases are larger than what fits into one byte."""
    from comfy.cli_args import args

    monkeypatch.setattr(args, "fp8_e4m3fn_text_enc", True)
    easyref = pack.run("EasyRefLoader", half_file, GOLDEN_MLLM, "auto")
    encode(easyref)
    model = easyref.encoder.patcher.model
    assert model.compute_dtype == torch.bfloat16
    query = model.multimodal_llm.model.layers[0].self_attn.q_proj
    assert query._v_weight.dtype == torch.float8_e4m3fn
    assert query._v_bias.dtype == torch.float16


@pytest.mark.parametrize("full", [False, True])
def test_int8_weights_lie_in_memory_and_are_moved_as_int8(
    pack: Pack, gpu: Gpu, half_file: str, encode: Callable[..., Any], full: bool
) -> None:
    """Unloaded and loaded again; the file may be gone then."""
    import comfy.model_management as mm

    gpu.full = full
    easyref = pack.run("EasyRefLoader", half_file, GOLDEN_MLLM, "int8")
    with gpu.watch() as first:
        encode(easyref)
    patcher = easyref.encoder.patcher
    assert patcher.is_dynamic()
    layer = patcher.model.multimodal_llm.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == torch.int8
    assert not layer.weight.is_meta
    if not full:
        assert (layer._v_weight.dtype, layer._v_bias.dtype) == (torch.int8, torch.bfloat16)
    assert layer.weight_scale.is_meta  # it stays on the GPU with the encoder
    assert not first.file_reads

    mm.unload_all_models()
    assert [name for name, tensor in tensors(patcher.model) if tensor.is_meta] == []
    (pack.base / "models" / "easyref" / half_file).touch()
    with gpu.watch() as again:
        encode(easyref, image_size=2 * IMAGE_SIZE)
    assert torch.int8 in {one.dtype for one in again.uploads}
    assert not again.file_reads


@pytest.mark.keeps
def test_the_running_prompt_keeps_its_encoder_and_the_cache_knows_when_it_costs_nothing(
    pack: Pack, gpu: Gpu, half_file: str, encode: Callable[..., Any]
) -> None:
    from comfy.model_patcher import PromptModelTracker, is_model_patcher_output
    from comfy_execution.caching import all_outputs_dynamic

    easyref = pack.run("EasyRefLoader", half_file, GOLDEN_MLLM, "auto")
    tracker = PromptModelTracker()
    tracker.add([[easyref]])
    assert not tracker.models
    assert not all_outputs_dynamic([[easyref]])
    encode(easyref)
    tracker.add([[easyref]])
    assert list(tracker.models.values()) == [easyref.encoder.patcher]
    assert not all_outputs_dynamic([[easyref]])  # what it keeps of the group
    easyref.encoder.forget()
    assert all_outputs_dynamic([[easyref]])
    assert is_model_patcher_output(easyref)
    tracker.end()


def test_the_encoder_can_be_built_again_as_a_plain_model(
    pack: Pack, gpu: Gpu, half_file: str, encode: Callable[..., Any]
) -> None:
    easyref = pack.run("EasyRefLoader", half_file, GOLDEN_MLLM, "bf16")
    encode(easyref)
    patcher = easyref.encoder.patcher
    plain = patcher.clone(disable_dynamic=True)
    assert not plain.is_dynamic()
    assert plain.model is not patcher.model
    copy = patcher.deepclone_multigpu()
    assert copy.is_dynamic()
    assert copy.model is not patcher.model


def test_weights_that_are_still_in_their_file_are_not_read_after_it_changed(
    pack: Pack, gpu: Gpu, encode: Callable[..., Any]
) -> None:
    tensors = {n: t.half() for n, t in adapter_tensors().items()}
    name = put_adapter(pack, "changes_for_gpu.safetensors", tensors)
    easyref = pack.run("EasyRefLoader", name, GOLDEN_MLLM, "bf16")
    encode(easyref)
    path = easyref.checkpoint.path
    old = path.stat()
    put_adapter(pack, name, {n: t * 2 for n, t in tensors.items()})
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    with pytest.raises(ValueError, match="has changed since it was loaded"):
        encode(easyref, prompt="something else")
    encode(pack.run("EasyRefLoader", name, GOLDEN_MLLM, "bf16"), prompt="something else")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_scaled_weights_are_multiplied_out_before_they_are_moved(
    pack: Pack, gpu: Gpu, encode: Callable[..., Any], precision: str
) -> None:
    tensors = {n: t.half() for n, t in adapter_tensors().items()}
    name = "multimodal_llm.model.layers.0.mlp.up_proj.weight"
    scale = torch.tensor(0.25)
    tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
    tensors[name.replace("weight", "scale_weight")] = scale
    file = put_adapter(pack, f"scaled_{precision}.safetensors", tensors)
    easyref = pack.run("EasyRefLoader", file, GOLDEN_MLLM, precision)
    encode(easyref)
    found = easyref.encoder.patcher.model.multimodal_llm.model.layers[0].mlp.up_proj.weight
    wanted = tensors[name].float() * scale
    if precision == "bf16":
        wanted = wanted.bfloat16()
    assert found.dtype == wanted.dtype
    assert torch.equal(found.cpu(), wanted)


def test_without_any_memory_weights_are_moved_for_each_use(
    pack: Pack, gpu: Gpu, half_file: str, encode: Callable[..., Any]
) -> None:
    gpu.full = True
    easyref = pack.run("EasyRefLoader", half_file, GOLDEN_MLLM, "bf16")
    encode(easyref)
    with gpu.watch() as second:
        encode(easyref, prompt="something else")
    layer = easyref.encoder.patcher.model.multimodal_llm.model.layers[0].mlp.up_proj.weight
    assert not layer.is_meta
    assert layer.nbytes in second.file_reads
