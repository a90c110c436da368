"""The command line starts, and inspects files of every kind, without importing PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.adapter.convert import convert_adapter

HEAVY = {"torch", "numpy", "PIL", "transformers", "safetensors"}
RUN = """
import json, sys, time
from easyref_core.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
seconds = time.process_time()
peak = 0
if sys.platform == "linux":
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
    peak = int(line.split()[1]) * 1024
modules = sorted({name.split(".")[0] for name in sys.modules})
print("\\n" + json.dumps([status, seconds, peak, modules]))
"""


def run(*arguments: str | Path) -> tuple[int, str, float, int]:
    """(status, what was printed, seconds of the CPU, most bytes of memory) of a fresh process."""
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    printed, _, last = done.stdout.rstrip("\n").rpartition("\n")
    status, seconds, peak, modules = json.loads(last)
    assert "easyref_core" in modules
    assert not HEAVY & set(modules)
    return status, printed + done.stderr, seconds, peak


def converted(folder: Path, **options: Any) -> Path:
    return convert_adapter(load_checkpoint(goldens.ADAPTER), folder / "a.safetensors", **options)


def in_float16_with_scales(folder: Path) -> Path:
    """Scales serve every dtype of weights."""
    tensors = goldens.adapter_tensors()
    name = "image_proj_model.proj.2."
    changed = {
        name + "weight": tensors[name + "weight"].half(),
        name + "weight_scale": torch.ones(1),
    }
    return goldens.write(folder / "a.safetensors", tensors | changed)


def saved_by_torch(folder: Path, **options: Any) -> Path:
    path = folder / "a.pt"
    tensors = goldens.adapter_tensors()
    turned = {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in tensors.items()}
    torch.save(turned, path, **options)
    return path


KINDS: dict[str, Callable[[Path], Path]] = {
    "whole": lambda _: goldens.ADAPTER,
    "in shards": lambda folder: converted(folder, max_shard_size="300KB"),
    "in fp8": lambda folder: converted(folder, dtype="fp8"),
    "in int8": lambda folder: converted(folder, dtype="int8"),
    "in fp8 and shards": lambda folder: converted(folder, dtype="fp8", max_shard_size="100KB"),
    "in float16 with scales": in_float16_with_scales,
    "of PyTorch": saved_by_torch,
    "of an old PyTorch": lambda f: saved_by_torch(f, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_inspected(tmp_path: Path, kind: str) -> None:
    path = KINDS[kind](tmp_path)
    status, printed, *_ = run("inspect", "--json", path)
    assert status == 0
    assert json.loads(printed) == load_checkpoint(path).report()


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for content in (b"", b"<!DOCTYPE html>", goldens.ADAPTER.read_bytes()[:-1]):
        path.write_bytes(content)
        assert run("inspect", path)[0] == 1


@pytest.mark.parametrize("command", [[], ["inspect"], ["encode"], ["train"], ["bench"]])
def test_help_is_shown(command: list[str]) -> None:
    status, printed, *_ = run(*command, "--help")
    assert status == 0
    assert printed.startswith("usage: easyref")


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux reports it")
def test_a_big_adapter_is_inspected_within_a_second_and_100_mb(tmp_path: Path, fp8: bool) -> None:
    shapes = goldens.real_shapes()
    path = goldens.sparse_file(tmp_path / "a.safetensors", shapes, fp8=fp8)
    status, printed, seconds, peak = run("inspect", "--json", path)
    assert status == 0
    assert json.loads(printed)["bytes"] > (2.9e9 if fp8 else 5.8e9)
    assert seconds < 1
    assert peak < 100e6
