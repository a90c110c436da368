"""make gpu-check's checks, tried with the golden models on a CPU: they run, and they can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from comfyhost import Pack

# Behind everything else: the pack's folder `nodes` must not stand before ComfyUI's module.
sys.path.append(str(Path(__file__).resolve().parents[3]))

from benchmarks.gpu_check import plan, worker
from benchmarks.gpu_check.report import FAIL, MEASURED, NOT_HERE, PASS, Row

ROOT = Path(__file__).resolve().parents[3]
Rows = Callable[[str], list[Row]]


@pytest.fixture(scope="module")
def shared_bench(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from benchmarks.gpu_check.bench import Bench
    from benchmarks.gpu_check.models import small_unet_recognised

    bench = Bench(pack, tmp_path_factory.mktemp("gpu_check"), small=True)
    bench.write_models()
    with small_unet_recognised(pack):
        yield bench


@pytest.fixture
def bench(shared_bench: Any) -> Any:
    """With models that no other test has loaded or broken."""
    shared_bench.drop()
    return shared_bench


@pytest.fixture
def rows(bench: Any) -> Rows:
    """A check's rows as the worker writes them."""

    def run(function: str) -> list[Row]:
        return list(worker.run(plan.by_name([function])[function], bench, worker.find))

    return run


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


def bare(bench: Any, function: str) -> dict[str, Row]:
    """A check's rows with their own verdicts, not lowered for the CPU."""
    return by_name(list(worker.find(function)(bench)))


GPU_ONLY = sorted({c.function for c in plan.CHECKS if c.gpu_only and c.name != "dynamic"})


@pytest.mark.parametrize("function", GPU_ONLY)
def test_checks_for_a_gpu_run_on_a_cpu_and_do_not_pass_there(rows: Rows, function: str) -> None:
    result = rows(function)
    assert {row.verdict for row in result[:-1]} == {NOT_HERE}, result
    assert len(result) > 2
    assert result[-1].verdict == MEASURED  # its time


def test_parity_passes_in_every_precision(rows: Rows) -> None:
    result = rows("parity:parity")
    assert [row.verdict for row in result] == [PASS] * 10 + [MEASURED]


def test_parity_fails_for_a_different_number(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    core = bench.pack.part("easyref_core.encode.encoder").EasyRefEncoder
    project = core.project
    monkeypatch.setattr(core, "project", lambda self, states: project(self, states) + 0.5)
    result = bare(bench, "parity:parity")
    for precision in ("fp32", "bf16", "fp16"):
        assert result[f"tokens, {precision}"].verdict == FAIL
        assert result[f"noise prediction, {precision}"].verdict == PASS
    assert result["tokens, int8"].verdict == FAIL


def test_a_wait_in_later_calls_is_detected(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.patcher_extension import WrappersMP

    def waits(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x.sum().item()
        return executor(x, *args, **kwargs)

    def with_wait(model: Any) -> Any:
        model = bench.apply(model, bench.tokens(1))
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "waits", waits)
        return model

    variants = {"good": lambda model: bench.apply(model, bench.tokens(1)), "bad": with_wait}
    monkeypatch.setattr(bench, "variants", lambda: variants)
    result = bare(bench, "sampling:syncs")
    assert result["good"].verdict == PASS
    assert result["bad"].verdict == FAIL
    assert result["bad"].value == 3  # of four steps


def test_slow_new_tokens_are_detected(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_check import sampling

    store = bench.pack.part("nodes.host.key_value_cache")
    project = store.project_tokens

    def slow(*args: Any) -> Any:
        time.sleep(0.6)
        return project(*args)

    monkeypatch.setattr(store, "project_tokens", slow)
    monkeypatch.setattr(sampling, "NEW_TOKENS", 0.2)
    result = bare(bench, "sampling:first_step")
    assert result["new tokens add"].verdict == FAIL


def test_a_peak_above_the_estimate_is_detected(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "peak", lambda: 10**9)
    result = bare(bench, "encoding:encode")
    assert result["2 references, peak / told"].verdict == FAIL
    monkeypatch.setattr(bench, "peak", lambda: 1000)
    result = bare(bench, "encoding:encode")
    assert result["2 references, peak / told"].verdict == PASS


def test_memory_that_grows_with_prompts_is_detected(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Any] = []
    encode = bench.encode

    def counted(*args: Any) -> Any:
        encoded.append(encode(*args))
        return encoded[-1]

    monkeypatch.setattr(bench, "encode", counted)
    monkeypatch.setattr(bench, "allocated", lambda: len(encoded) * 43_000_000)
    result = bare(bench, "memory:growth")
    assert result["more after 20 prompts"].value == pytest.approx(17 * 43)
    assert result["more after 20 prompts"].verdict == FAIL


def test_memory_that_is_not_freed_is_detected(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    encode = bench.encode

    def kept(*args: Any) -> Any:
        left.append(200_000)
        return encode(*args)

    monkeypatch.setattr(bench, "encode", kept)
    monkeypatch.setattr(bench, "allocated", lambda: sum(left))
    result = bare(bench, "memory:free")
    assert result["left"].value == pytest.approx(0.2)
    assert result["left"].verdict == FAIL
    assert result["left with outputs in the caches"].verdict == PASS


def test_latents_with_and_without_dynamic_vram_are_compared(bench: Any) -> None:
    from safetensors.torch import load_file, save_file

    bare(bench, "dynamic:with_dynamic_vram")
    result = bare(bench, "dynamic:without_dynamic_vram")
    assert {row.verdict for row in result.values()} == {PASS}
    (file,) = bench.work.glob("*.safetensors")
    other = load_file(file)
    other["latents"] = -other["latents"]
    save_file(other, file)
    result = bare(bench, "dynamic:without_dynamic_vram")
    assert result["latents, cosine with and without"].verdict == FAIL
    assert result["tokens, cosine with and without"].verdict == PASS


def test_without_latents_to_compare_with_nothing_passes(bench: Any, tmp_path: Path) -> None:
    bench.work, work = tmp_path, bench.work
    check = plan.by_name(["dynamic:without_dynamic_vram"])["dynamic:without_dynamic_vram"]
    result = list(worker.run(check, bench, worker.find))
    bench.work = work
    assert [row.verdict for row in result] == [NOT_HERE, MEASURED]


def test_quantised_checkpoints_keep_lora_and_references(rows: Rows) -> None:
    from comfy.quant_ops import QUANT_ALGOS

    result = by_name(rows("quantised:quantised"))
    assert {row.verdict for name, row in result.items() if name.startswith("fp8")} == {PASS}
    assert result["unquantised, without LoRA"].verdict == PASS
    known = "int8_tensorwise" in QUANT_ALGOS
    int8 = {row.verdict for name, row in result.items() if name.startswith("int8")}
    assert int8 == {PASS if known else NOT_HERE}


def test_a_quantised_checkpoint_without_lora_is_detected(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu_check import quantised

    def load_and_lose(name: str) -> Any:
        apply = bench.apply
        monkeypatch.setattr(
            bench, "apply", lambda model, *args, **kw: apply(model, *args, lora_strength=0.0, **kw)
        )
        return load_unet(name)

    load_unet = quantised.load_unet
    monkeypatch.setattr(quantised, "load_unet", load_and_lose)
    monkeypatch.setattr(quantised, "FORMATS", {"fp8": "float8_e4m3fn"})
    result = bare(bench, "quantised:quantised")
    assert result["fp8, plain as unquantised"].verdict == PASS
    assert result["fp8, steered as unquantised"].verdict == FAIL
    assert result["fp8, effect as unquantised"].verdict == FAIL


@pytest.fixture
def few_variants(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of those that are compiled, since tracing takes seconds."""
    from benchmarks.gpu_check import compiled

    variants = compiled._variants(bench)
    few = {name: variants[name] for name in ("plain", "one Apply")}
    monkeypatch.setattr(compiled, "_variants", lambda bench: few)


@pytest.mark.usefixtures("few_variants")
def test_a_trace_with_old_references_is_detected(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = bench.pack.part("nodes.sampling.compiled_call")
    monkeypatch.setattr(call, "is_compiled", lambda *args: False)
    result = islice(worker.find("compiled:compiled")(bench), 2)
    assert [row.verdict for row in result] == [PASS, FAIL]


def test_all_orders_pass_where_compiling_changes_nothing(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfyhost

    monkeypatch.setattr(comfyhost, "stock", lambda node, model, backend: model)
    result = rows("compiled:compiled")
    assert [row.verdict for row in result] == [PASS] * 4 + [MEASURED]


@pytest.fixture
def as_on_a_gpu(bench: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """PyTorch's functions for a GPU by name, as stand-ins that take what the real ones take."""
    monkeypatch.setattr(type(bench), "gpu", property(lambda self: True))
    answers: dict[str, Any] = {
        "synchronize": None,
        "memory_allocated": 0,
        "max_memory_allocated": 5_000_000,
        "reset_peak_memory_stats": None,
        "mem_get_info": (70 * plan.GIB, 80 * plan.GIB),
        "get_device_properties": SimpleNamespace(total_memory=80 * plan.GIB),
        "set_per_process_memory_fraction": None,
        "get_sync_debug_mode": 0,
        "set_sync_debug_mode": None,
    }
    stand_ins = {}
    for name, answer in answers.items():
        stand_ins[name] = create_autospec(getattr(torch.cuda, name), return_value=answer)
        monkeypatch.setattr(torch.cuda, name, stand_ins[name])
    event = create_autospec(torch.cuda.Event)
    event.return_value.elapsed_time.return_value = 50.0
    stand_ins["Event"] = event
    monkeypatch.setattr(torch.cuda, "Event", event)
    return stand_ins


def test_steps_are_timed_by_the_gpu(bench: Any, as_on_a_gpu: dict[str, Any]) -> None:
    first, later = bench.step_times(bench.unet(), 3)
    assert (first, later) == (0.05, [0.05, 0.05])
    assert as_on_a_gpu["Event"].return_value.record.call_count == 4
    as_on_a_gpu["Event"].assert_called_with(enable_timing=True)


def test_waits_are_pytorchs_warnings_with_their_places(
    bench: Any, as_on_a_gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.patcher_extension import WrappersMP

    def waits(executor: Any, *args: Any, **kwargs: Any) -> Any:
        warnings.warn("called a synchronizing CUDA operation (Triggered at x.cpp:1)", stacklevel=1)
        return executor(*args, **kwargs)

    def with_wait(model: Any) -> Any:
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "waits", waits)
        return model

    monkeypatch.setattr(bench, "variants", lambda: {"bad": with_wait})
    result = bare(bench, "sampling:syncs")
    assert result["bad"].value == 3
    assert "benchmarks/test_comfy_gpu_check.py:" in result["bad"].note
    modes = [call.args[0] for call in as_on_a_gpu["set_sync_debug_mode"].call_args_list]
    assert modes == ["warn", 0] * 6  # later calls of both samplings, each mode restored


def test_the_small_gpu_is_a_part_of_the_big_one(
    bench: Any, as_on_a_gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "require_counting", lambda: None)
    result = bare(bench, "memory:small_card")
    as_on_a_gpu["set_per_process_memory_fraction"].assert_called_once_with(6 / 80, bench.device)
    assert result["tensors, at most"].value == pytest.approx(5)
    assert {row.verdict for row in result.values()} == {PASS, MEASURED}
    monkeypatch.setattr(bench, "peak", lambda: 7 * plan.GIB)
    assert bare(bench, "memory:small_card")["tensors, at most"].verdict == FAIL


def test_an_allocator_that_does_not_count_is_detected(
    bench: Any, as_on_a_gpu: dict[str, Any]
) -> None:
    with pytest.raises(RuntimeError, match="PyTorch counts 0 of"):
        bench.require_counting()


def test_a_check_that_raises_is_a_row_that_says_why(
    bench: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise ValueError("no such picture")

    monkeypatch.setattr(bench, "encode", fail)
    *_, failed, seconds = rows("encoding:encode")
    assert failed.verdict == FAIL
    assert "ValueError: no such picture (test_comfy_gpu_check.py:" in failed.note
    assert seconds.verdict == MEASURED


def test_the_command_runs_checks_in_comfyui_as_main_starts_it(
    comfyui: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--small", "--only", "parity"]
    command += ["--only", "first_step", "--out", str(out), "--comfyui", str(comfyui)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    verdicts = {row["check"]: set() for row in content["rows"]}
    for row in content["rows"]:
        verdicts[row["check"]].add(row["verdict"])
    assert verdicts == {"parity": {PASS, MEASURED}, "first_step": {NOT_HERE, MEASURED}}
    assert "noise prediction, bf16" in done.stdout
    assert (content["card"], content["small"], content["passed"]) == (None, True, True)
