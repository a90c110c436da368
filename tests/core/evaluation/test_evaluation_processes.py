"""Several processes share a run and leave the files of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_fakes
import pytest
import torch
from bench_fakes import bench, make_groups, settings_for, snapshot, timeless

pytestmark = pytest.mark.slow
MORE = {"batch_size": 2, "images": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    make_groups(tmp_path / "groups", dict.fromkeys("abcde", 3))
    return tmp_path


def launch(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes, as `accelerate launch` starts them on GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", bench_fakes.__file__]
    root = Path(bench_fakes.__file__).parents[1]
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [*command, str(folder), "0", json.dumps(MORE)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        check=False,
        timeout=250,
    )


def test_two_processes_leave_the_files_of_one(folder: Path) -> None:
    done = launch(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "20"  # the first process alone says it
    both = snapshot(folder / "run")
    (folder / "run").rename(folder / "of_two")
    bench(settings_for(folder, **MORE))
    assert timeless(both) == timeless(snapshot(folder / "run"))


def test_a_folder_that_is_not_shared_is_refused(folder: Path) -> None:
    done = launch(folder, OUT_OF_1=str(folder / "elsewhere"))
    assert done.returncode != 0
    assert "process 1 of 2 finds another folder there" in done.stderr
    assert not (folder / "run" / "run.json").exists()


def test_what_the_first_process_refuses_ends_all_of_them(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.txt").write_text("years of work")
    done = launch(folder)
    assert done.returncode != 0
    assert done.stderr.count("holds something else than a benchmark run") == 1
