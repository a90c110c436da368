"""DeepSpeed ZeRO-2 and FSDP on two CPU processes: the losses and the weights of one process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from easyref_core.training.config import load_settings
from easyref_core.training.loop import train

PROGRAM = Path(__file__).with_name("sharded_on_cpu.py")
# Where `make test` installs DeepSpeed, which cannot be built everywhere.
DEEPSPEED = Path(sys.prefix) / "deepspeed"
EXACT = 1e-5


WRAPPED = {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def start(kind: str, recipe: Path, folder: Path, stop: int = 0) -> subprocess.CompletedProcess[str]:
    """Train with two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc_per_node", "2", str(PROGRAM), kind, str(stop), str(recipe)]
    path = os.pathsep.join(filter(None, (str(DEEPSPEED), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    # As from `accelerate config`; the recipe's accumulation overrides it.
    environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "3"
    return subprocess.run(
        [*launch, f"output.folder={folder}"],
        capture_output=True,
        text=True,
        env=environment | WRAPPED | {"PYTHONPATH": path},
        check=False,
    )


def run(kind: str, recipe: Path, folder: Path, stop: int = 0) -> dict[int, float]:
    """The losses of all steps."""
    done = start(kind, recipe, folder, stop)
    assert (done.returncode != 0) == bool(stop), done.stderr[-3000:]
    lines = (folder / "losses.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


@pytest.fixture(params=["fsdp", "deepspeed"])
def kind(request: pytest.FixtureRequest) -> str:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    found = (DEEPSPEED / "deepspeed").is_dir() or importlib.util.find_spec("deepspeed")
    if request.param == "deepspeed" and not found:
        pytest.skip("no DeepSpeed: make test installs it where it can be built")
    return request.param


def test_sharded_processes_equal_one_and_resume_where_they_died(
    kind: str, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe(optimiser_steps=4, optimiser_max_grad_norm=0.5)
    one = train(load_settings(path, ["optimiser.accumulation=2"]))
    folder = tmp_path / kind
    before = run(kind, path, folder, stop=3)
    assert sorted(before) == [1, 2, 3]
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    after = run(kind, path, folder)
    assert after == pytest.approx(one.losses, abs=EXACT)

    alone, sharded = load_file(one.exported), load_file(folder / "easyref.safetensors")
    assert alone.keys() == sharded.keys()
    # Adam amplifies rounding errors of tiny gradients.
    wrong = {n: float((alone[n] - sharded[n]).abs().mean()) for n in alone}
    assert max(wrong.values()) < 1e-4, max(wrong, key=wrong.__getitem__)


@pytest.fixture
def shapes(recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes recipes for images whose batches all have different numbers of shapes."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    sides = [(80, 80), (240, 60), (60, 240), (160, 80)]
    for number, size in enumerate(sides):
        Image.new("RGB", size, (60 * number, 90, 30)).save(pictures / f"{number}.png")
    names = [[f"{n}.png" for n in range(group % 4 + 1)] for group in range(8)]
    items = [{"image_file": some, "text": "a scene", "target": some[-1]} for some in names]
    (pictures / "groups.json").write_text(json.dumps(items))

    def write(**changes: Any) -> Path:
        files = {"data_files": [str(pictures / "groups.json")], "data_root": str(pictures)}
        return recipe(**files, **changes)

    return write


def test_fsdp_trains_on_images_of_different_shapes(
    shapes: Callable[..., Path], tmp_path: Path
) -> None:
    path = shapes(optimiser_steps=2, optimiser_precision="bf16")
    one = train(load_settings(path, ["optimiser.accumulation=2"]))
    losses = run("fsdp", path, tmp_path / "fsdp")
    assert losses == pytest.approx(one.losses, rel=1e-2)
    # Not rounded to what it computes in.
    assert losses[1] != float(torch.tensor(losses[1]).bfloat16())


@pytest.mark.parametrize("asked", ["optimiser.ema", "output.validation"])
def test_ema_and_validation_are_refused_with_sharded_weights(
    recipe: Callable[..., Path], training_set: Any, tmp_path: Path, asked: str
) -> None:
    values = {"optimiser.ema": 0.9, "output.validation": str(training_set.records)}
    path = recipe(optimiser_steps=2, **{asked.replace(".", "_"): values[asked]})
    said = start("fsdp", path, tmp_path / "run")
    assert said.returncode != 0
    assert f"{asked} needs " in said.stderr
