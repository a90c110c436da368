"""The encoder under ComfyUI's memory management: loaded, split, unloaded, out of memory."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfyhost import ADAPTER_ONLY, CASE, GOLDEN, GOLDEN_MLLM, Pack, golden, off_golden, put_adapter
from goldens import IMAGE_SIZE, adapter_tensors, difference, user_prompt

TOKENS = 1e-4


def test_nothing_is_loaded_before_the_first_encoding(
    fresh_easyref: Any, encode: Callable[..., Any]
) -> None:
    assert fresh_easyref.encoder.patcher is None
    encode()
    assert fresh_easyref.encoder.patcher is not None


def test_the_encoder_is_unloaded_and_loaded_again(
    fresh_easyref: Any, encode: Callable[..., Any]
) -> None:
    import comfy.model_management as mm

    first = encode()
    patcher = fresh_easyref.encoder.patcher
    assert any(loaded.model is patcher for loaded in mm.current_loaded_models)
    mm.unload_all_models()
    assert not any(loaded.model is patcher for loaded in mm.current_loaded_models)
    fresh_easyref.encoder.forget()
    again = encode()
    assert fresh_easyref.encoder.patcher is patcher, "it was read from the disk again"
    assert torch.equal(again.cond, first.cond)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_a_partly_loaded_encoder_gives_the_same_tokens(
    fresh_easyref: Any,
    encode: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    share: float,
) -> None:
    """The rest stays where it is and is cast layer by layer, as on a card with little memory."""
    import comfy.model_management as mm

    encode()
    patcher = fresh_easyref.encoder.patcher
    patcher.detach()
    fresh_easyref.encoder.forget()

    def load_part(models: list[Any], **kwargs: Any) -> None:
        (model,) = models
        model.patch_model(model.load_device, lowvram_model_memory=int(patcher.size * share) or 1)

    monkeypatch.setattr(mm, "load_models_gpu", load_part)
    tokens = encode(prompt=user_prompt(CASE))
    assert patcher.model.model_lowvram
    assert patcher.loaded_size() < patcher.size
    assert off_golden(tokens) < TOKENS


def test_every_layer_of_the_encoder_can_stay_on_another_device(
    fresh_easyref: Any, encode: Callable[..., Any]
) -> None:
    """A plain torch layer would break as soon as ComfyUI leaves its weights on the CPU."""
    encode()
    encoder = fresh_easyref.encoder.patcher.model
    plain = [
        f"{name}.{weight}"
        for name, module in encoder.named_modules()
        for weight, _ in module.named_parameters(recurse=False)
        if not hasattr(module, "comfy_cast_weights")
    ]
    assert plain == []
    # Cast where they are used; ComfyUI moves buffers as a whole, and back.
    assert [name for name, _ in encoder.named_buffers()] == ["mllm_final_layer.reference_tokens"]
    assert encoder.state_dict().keys() == fresh_easyref.encoder.plan().sources.keys()


@pytest.mark.parametrize(
    ("precision", "storage", "close"),
    [("fp32", torch.float32, 1e-4), ("bf16", torch.bfloat16, 0.3), ("fp16", torch.float16, 0.05)],
)
def test_each_precision_is_stored_and_computed_in(
    pack: Pack,
    encode: Callable[..., Any],
    precision: str,
    storage: torch.dtype,
    close: float,
) -> None:
    easyref = pack.run("EasyRefLoader", "golden.safetensors", GOLDEN_MLLM, precision)
    tokens = encode(easyref)
    encoder = easyref.encoder.patcher.model
    assert {p.dtype for p in encoder.parameters()} == {storage}
    assert encoder.compute_dtype == storage
    assert tokens.cond.dtype == torch.float32
    assert off_golden(tokens) < close
    assert (off_golden(tokens) > 1e-4) == (precision != "fp32")


def test_a_half_precision_file_stays_small_and_is_converted_when_used(
    pack: Pack, encode: Callable[..., Any]
) -> None:
    half = {n: t.half() for n, t in adapter_tensors().items()}
    name = put_adapter(pack, "half.safetensors", half)
    wide = put_adapter(pack, "widened.safetensors", {n: t.float() for n, t in half.items()})
    stored, computed = (pack.run("EasyRefLoader", n, GOLDEN_MLLM, "fp32") for n in (name, wide))
    assert difference(encode(stored).cond, encode(computed).cond) < 1e-5
    assert {p.dtype for p in stored.encoder.patcher.model.parameters()} == {torch.float16}
    assert stored.encoder.patcher.size * 2 == computed.encoder.patcher.size


@pytest.fixture
def progress(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(done, total) of every step reported to ComfyUI's progress bar.

    Newer ComfyUIs do not show every one of them: always the first and the last, and between them
    what does not follow too soon.
    """
    import comfy.utils

    steps: list[tuple[int, int]] = []

    class Bar(comfy.utils.ProgressBar):
        def update_absolute(self, value: int, total: int | None = None, *details: Any) -> None:
            steps.append((value, total or self.total))
            super().update_absolute(value, total, *details)

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    return steps


@pytest.mark.parametrize(
    ("flag", "storage"),
    [
        ("fp8_e4m3fn_text_enc", torch.float8_e4m3fn),
        ("fp8_e5m2_text_enc", torch.float8_e5m2),
        ("fp16_text_enc", torch.float16),
        ("bf16_text_enc", torch.bfloat16),
    ],
)
def test_auto_follows_comfyuis_dtype_of_text_encoders(
    pack: Pack,
    encode: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    storage: torch.dtype,
) -> None:
    """A CPU is slow at all of these, so it computes in float32."""
    from comfy.cli_args import args

    monkeypatch.setattr(args, flag, True)
    easyref = pack.run("EasyRefLoader", GOLDEN, GOLDEN_MLLM, "auto")
    tokens = encode(easyref)
    assert torch.isfinite(tokens.cond).all()
    encoder = easyref.encoder.patcher.model
    assert encoder.compute_dtype == torch.float32
    narrow = storage.itemsize == 1
    for name, weight in encoder.state_dict().items():
        small = weight.ndim == 1 or name.endswith("reference_tokens")
        assert weight.dtype == (torch.float32 if narrow and small else storage), name
    assert narrow or off_golden(tokens) < 0.3

    chosen = pack.run("EasyRefLoader", GOLDEN, GOLDEN_MLLM, "fp32")
    assert off_golden(encode(chosen)) < TOKENS, "what the graph says comes first"


def test_auto_converts_weights_to_comfyuis_dtype_of_text_encoders(
    pack: Pack, encode: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.cli_args import args

    name = put_adapter(
        pack, "half.safetensors", {n: t.half() for n, t in adapter_tensors().items()}
    )
    monkeypatch.setattr(args, "fp32_text_enc", True)
    easyref = pack.run("EasyRefLoader", name, GOLDEN_MLLM, "auto")
    encode(easyref)
    assert {p.dtype for p in easyref.encoder.patcher.model.parameters()} == {torch.float32}


def test_weights_outlive_a_file_that_is_cut_off(pack: Pack, encode: Callable[..., Any]) -> None:
    """Were they still mapped, reading them would end the process."""
    name = put_adapter(pack, "cut_later.safetensors", adapter_tensors())
    easyref = pack.run("EasyRefLoader", name, GOLDEN_MLLM, "fp32")
    before = encode(easyref)
    os.truncate(easyref.checkpoint.path, 1000)
    other = encode(easyref, prompt="another prompt", image_size=2 * IMAGE_SIZE)
    assert torch.isfinite(other.cond).all()
    assert torch.equal(encode(easyref).cond, before.cond)


def test_comfyui_finds_the_encoder_of_the_loaders_value(
    pack: Pack, fresh_easyref: Any, encode: Callable[..., Any]
) -> None:
    assert fresh_easyref.patcher is None
    encode()
    assert fresh_easyref.patcher is fresh_easyref.encoder.patcher
    assert not fresh_easyref.is_dynamic()


def test_an_interrupt_while_encoding_stops_soon_and_the_next_run_is_clean(
    encode: Callable[..., Any], progress: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm
    import comfy.utils

    def press_the_button(*args: Any, **kwargs: Any) -> None:
        mm.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", press_the_button)
    with pytest.raises(mm.InterruptProcessingException):
        encode()
    assert [done for done, _ in progress] == [1], (
        "the step after the button was pressed is the last"
    )
    monkeypatch.undo()
    assert off_golden(encode()) < TOKENS


def test_progress_counts_every_picture_and_layer_up_to_the_end(
    encode: Callable[..., Any], progress: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.utils

    shown: list[tuple[int, int]] = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *a, **k: shown.append((value, total))
    )
    encode()
    total = 5 + 2 * 4  # four pictures and the black one; two chats through four layers
    assert progress == [(done, total) for done in range(1, total + 1)]
    assert (shown[0], shown[-1]) == (progress[0], progress[-1])
    assert set(shown) <= set(progress)


@pytest.mark.parametrize(
    "kind", ["ComfyUI's", "known to ComfyUI", "allocate memory", "MemoryError"]
)
def test_out_of_memory_frees_everything_and_the_next_run_works(
    pack: Pack,
    unet: Any,
    fresh_easyref: Any,
    encode: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    import comfy.model_management as mm

    encode()
    mm.load_models_gpu([unet])
    encoder = weakref.ref(fresh_easyref.encoder.patcher.model)
    error = {
        "ComfyUI's": mm.OOM_EXCEPTION("tried to allocate 99 GiB"),
        "known to ComfyUI": RuntimeError("error 2"),
        "allocate memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: 99 GiB"),
        "MemoryError": MemoryError(),
    }[kind]
    kept: list[Any] = []

    def run_out(result: Any, *args: Any, **kwargs: Any) -> Any:
        big = torch.zeros(1000)
        kept.append(weakref.ref(big))
        raise error

    hosted = pack.part("nodes.host.encoder")
    monkeypatch.setattr(hosted, "encode_references", run_out)
    monkeypatch.setattr(mm, "is_oom", lambda result: "error 2" in str(result), raising=False)
    fresh_easyref.encoder.forget()
    with pack.refused("Not enough memory", "4 references", "Use fewer references"):
        encode()
    monkeypatch.undo()
    error.__traceback__ = None
    gc.collect()
    assert fresh_easyref.encoder.patcher is None
    assert mm.current_loaded_models == []
    assert encoder() is None
    assert kept[0]() is None
    assert off_golden(encode()) < TOKENS


@pytest.mark.keeps
def test_out_of_memory_is_tried_once_more_with_everything_unloaded(
    pack: Pack,
    unet: Any,
    fresh_easyref: Any,
    encode: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import comfy.model_management as mm

    encode(prompt="something else")
    mm.load_models_gpu([unet])
    encoder, patcher = fresh_easyref.encoder, fresh_easyref.encoder.patcher
    hosted, calls = pack.part("nodes.host.encoder"), []
    work = hosted.encode_references

    def run_out_once(*args: Any, **kwargs: Any) -> Any:
        calls.append((encoder._cache.nbytes, len(mm.current_loaded_models)))
        if len(calls) == 1:
            raise MemoryError
        return work(*args, **kwargs)

    monkeypatch.setattr(hosted, "encode_references", run_out_once)
    assert off_golden(encode()) < TOKENS
    (before, both), (after, alone) = calls
    assert before > after == 0
    assert (both, alone) == (2, 1)
    assert encoder.patcher is patcher, "the weights were read again"


def test_another_error_is_not_reported_as_out_of_memory(
    pack: Pack, encode: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(pack.part("nodes.host.encoder"), "encode_references", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        encode()


def test_two_adapters_are_two_encoders(pack: Pack, encode: Callable[..., Any]) -> None:
    full = pack.run("EasyRefLoader", "golden.safetensors", GOLDEN_MLLM, "auto")
    body = pack.run("EasyRefLoader", ADAPTER_ONLY, GOLDEN_MLLM, "auto")
    for _ in range(2):
        assert off_golden(encode(full)) < TOKENS
        assert difference(encode(body).cond, golden(f"adapter_only.{CASE}.tokens")) < TOKENS


@pytest.mark.parametrize(
    ("device", "system", "directml", "wanted"),
    [
        ("mps", (14, 5), False, torch.bfloat16),
        ("mps", (13, 6), False, torch.float32),
        ("meta", None, True, torch.float32),
    ],
)
def test_macos_and_directml_are_checked_for_their_dtypes(
    pack: Pack,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    system: Any,
    directml: bool,
    wanted: torch.dtype,
) -> None:
    """Never float16 by itself, in which the MLLM overflows."""
    import comfy.model_management as mm

    monkeypatch.setattr(mm, "mac_version", lambda: system)
    monkeypatch.setattr(mm, "directml_enabled", directml)
    _, compute = pack.part("nodes.host.encoder_weights").dtypes_of("auto", torch.device(device))
    assert compute == wanted
