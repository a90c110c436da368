"""What a group needs is known, and what cannot be encoded refused, before any weight is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from easyref_core.adapter.checkpoint import AdapterCheckpoint, load_checkpoint
from easyref_core.cli import main
from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.group import GroupPlan, Reference, plan_group
from easyref_core.encode.passes import encode_references
from easyref_core.encode.plan_encoder import EncoderPlan, plan_encoder
from easyref_core.out_of_memory import lack_of_memory
from easyref_core.qwen2vl.prompt import PromptTokenizer
from easyref_core.tokens.reference_tokens import load_tokens

FOUR = "four_refs_prompt"
REFS = [str(goldens.GOLDEN / "refs" / f"ref_{i}.png") for i in range(4)]
NO_ROOM = {
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB"),
    "linux": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    "windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    "python": MemoryError(),
    "mmap": OSError(12, "Cannot allocate memory"),
    "accelerator": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
    "hip": RuntimeError("HIP error: hipErrorOutOfMemory"),
    "xpu": RuntimeError("level_zero backend failed with 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    "xpu resources": RuntimeError("Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)"),
    "directml": RuntimeError(
        "Could not allocate tensor with 9 bytes. There is not enough GPU video memory available!"
    ),
    "mps buffer": RuntimeError("Invalid buffer size: 13.50 GB"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"),
    "cublas handle": RuntimeError(
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    ),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "dynamic vram": MemoryError("VBAR OOM"),
    "dynamic vram's buffer": RuntimeError("VRAM grow failed: 9 bytes"),
    "dynamic vram's pins": RuntimeError("HostBuffer allocation failed"),
    "page file": OSError(22, "The paging file is too small for this operation to complete."),
    "safetensors": SafetensorError("Error while opening: Cannot allocate memory (os error 12)"),
    "attention": RuntimeError("Not enough memory, use lower resolution (max approx. 64x64)."),
}
OTHER = (
    ValueError("out of memory"),
    RuntimeError("nan"),
    OSError("x"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("comfy-aimdo is not initialized"),
    OSError(2, "No such file or directory"),
)
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def plan(checkpoint: AdapterCheckpoint) -> EncoderPlan:
    return plan_encoder(checkpoint, goldens.MLLM)


def arguments(out: Path, *images: str, **options: Any) -> list[str]:
    given = {"adapter": goldens.ADAPTER, "mllm": goldens.MLLM, "image-size": 84, "out": out}
    given |= {name.replace("_", "-"): value for name, value in options.items()}
    return ["encode", *(f"--{name}={value}" for name, value in given.items()), *(images or REFS)]


@pytest.mark.parametrize("aggregation", ["easyref", "average", "concatenate"])
def test_a_plan_knows_passes_positions_and_steps_before_weights_are_read(
    plan: EncoderPlan, tokenizer: PromptTokenizer, aggregation: str
) -> None:
    group = goldens.references(FOUR)
    found = plan_group(plan, tokenizer, group, "a boat", aggregation=aggregation, image_size=84)
    counts = [len(mllm_pass.images) for mllm_pass in found.passes]
    assert counts == ([4] if aggregation == "easyref" else [1] * 4)
    for mllm_pass in (*found.passes, found.unconditional):
        for image, (first, end) in zip(mllm_pass.images, mllm_pass.chat.image_spans, strict=True):
            assert end - first == image.num_tokens == image.patches().num_tokens
    assert found.steps == 4 + 1 + (len(counts) + 1) * plan.config.num_layers
    assert found.insert_before == plan.checkpoint.final_layers


def test_many_negatives_need_the_most_memory(plan: EncoderPlan, tokenizer: PromptTokenizer) -> None:
    group = goldens.references(FOUR)

    def needed(**settings: Any) -> int:
        return plan_group(plan, tokenizer, group, "", **settings).working_bytes(torch.float32, True)

    assert needed(negatives=group * 3) > needed()


def test_cache_keys_tell_pixels_sizes_and_settings_apart(
    plan: EncoderPlan, tokenizer: PromptTokenizer
) -> None:
    def planned(colour: str = "red", **settings: Any) -> GroupPlan:
        group = [Reference(Image.new("RGB", (60, 90), colour))]
        given = {"image_size": 84, "negatives": group} | settings
        return plan_group(plan, tokenizer, group, "a boat", **given)

    plain, others = planned(), [planned("blue"), planned(image_size=112)]
    assert planned().passes[0].images[0].key == plain.passes[0].images[0].key
    assert plain.passes[0].images[0].key not in {o.passes[0].images[0].key for o in others}
    others.append(planned(insert_before=2))
    assert planned().unconditional_key == plain.unconditional_key
    assert plain.unconditional_key not in {other.unconditional_key for other in others}


@pytest.mark.parametrize("size", [5069, 10**9])
def test_an_image_size_beyond_the_context_is_refused(
    plan: EncoderPlan, tokenizer: PromptTokenizer, size: int
) -> None:
    assert plan.config.max_positions == 32768
    with goldens.refused(f"image_size is {size}", "32,768", "at most 5068", "or 0", "(336)"):
        plan_group(plan, tokenizer, goldens.references(FOUR), "", image_size=size)


def test_an_adapter_trained_at_such_a_size_is_refused(
    tmp_path: Path, tokenizer: PromptTokenizer
) -> None:
    path = goldens.write(tmp_path / "a.safetensors", goldens.adapter_tensors(), image_size="99999")
    plan = plan_encoder(load_checkpoint(path), goldens.MLLM)
    with goldens.refused("image_size is 99999", "at most 5068"):
        plan_group(plan, tokenizer, goldens.references(FOUR), "")


@pytest.mark.parametrize("aggregation", ["average", "concatenate"])
def test_a_baseline_with_all_weights_zero_is_refused_before_encoding(
    encoder: EasyRefEncoder,
    tokenizer: PromptTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    aggregation: str,
) -> None:
    monkeypatch.setattr(EasyRefEncoder, "encode_image", lambda *_: pytest.fail("encoded"))
    nothing = [replace(r, weight=0.0) for r in goldens.references(FOUR)]
    with goldens.refused("weight 0", aggregation):
        goldens.encode(encoder, tokenizer, nothing, "", aggregation=aggregation)


def folder(path: Path) -> str:
    path.mkdir()
    return str(path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_size": 20}, "image_size is 20"),
        ({"image_size": 10**9}, "image_size is 1000000000"),
        ({"aggregation": "sum"}, "no aggregation 'sum'"),
        ({"insert_before": 9}, "last 9 layers"),
        ({"image_size": 3000}, "the MLLM would read"),
        ({"out": REFS[0] + "/tokens"}, "cannot be written"),
        ({"out": folder}, "cannot be written"),
    ],
)
def test_the_command_refuses_before_it_reads_weights(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, options: dict, said: str
) -> None:
    monkeypatch.setattr(EncoderPlan, "build", lambda *_, **__: pytest.fail("read weights"))
    out = options.get("out", tmp_path / "new" / "tokens")
    out = out(tmp_path / "folder") if callable(out) else out
    assert main(arguments(**options | {"out": out})) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("easyref: ")
    assert said in printed
    assert not (tmp_path / "new").exists()


def test_the_command_holds_no_full_size_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are kept at the size the MLLM reads, which changes no bit of the tokens."""
    large = [str(tmp_path / f"{side}.png") for side in (500, 900)]
    for path, side in zip(large, (500, 900), strict=True):
        noise = Image.effect_noise((side, 700), 90).convert("RGB")
        noise.save(path)
    kept: list[int] = []

    def noted(*given: Any, **options: Any) -> Any:
        kept.extend(max(reference.picture.size) for reference in given[1].references)
        return encode_references(*given, **options)

    monkeypatch.setattr("easyref_core.encode.passes.encode_references", noted)
    assert main(arguments(tmp_path / "tokens", *large)) == 0
    assert max(kept) < 200
    encoder = plan_encoder(load_checkpoint(goldens.ADAPTER), goldens.MLLM).build()
    whole = [Reference(Image.open(path)) for path in large]
    tokenizer = PromptTokenizer.from_directory(goldens.MLLM)
    wanted = goldens.encode(encoder, tokenizer, whole, "", image_size=84)
    assert torch.equal(load_tokens(tmp_path / "tokens").cond, wanted.cond)


@pytest.mark.parametrize("step", ["open_picture", "build", "encode"])
@pytest.mark.parametrize("kind", ["linux", "mps", "python", "cuda"])
def test_lack_of_memory_is_one_sentence(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, step: str, kind: str
) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise NO_ROOM[kind]

    name = {
        "open_picture": "easyref_core.pictures.loading.open_picture",
        "build": "easyref_core.encode.plan_encoder.EncoderPlan.build",
        "encode": "easyref_core.encode.passes.encode_references",
    }[step]
    monkeypatch.setattr(name, run_out)
    assert main(arguments(tmp_path / "tokens")) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("easyref: cpu has not enough memory (")
    assert "--dtype bfloat16" in said


def test_another_error_is_not_taken_for_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(EncoderPlan, "build", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        main(arguments(tmp_path / "tokens"))


@pytest.mark.parametrize("kind", NO_ROOM)
def test_lack_of_memory_is_known_by_what_devices_say(kind: str) -> None:
    assert lack_of_memory(NO_ROOM[kind])
    assert "\n" not in lack_of_memory(NO_ROOM[kind])


@pytest.mark.parametrize("error", OTHER)
def test_other_errors_are_no_lack_of_memory(error: Exception) -> None:
    assert lack_of_memory(error) is None
