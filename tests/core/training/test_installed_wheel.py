"""The wheel, installed into an environment of its own, is enough to inspect, encode and train."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import goldens
import pytest
from repository import copy_repository, run

from easyref_core.tokens.reference_tokens import load_tokens

PACK = Path(__file__).resolve().parents[3]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
SCRIPTS = "Scripts" if os.name == "nt" else "bin"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of all files that git knows or would add."""
    pytest.importorskip("pip")
    pytest.importorskip("wheel")
    folder = tmp_path_factory.mktemp("wheel")
    copy_repository(PACK, folder / "source")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder))
    run([*PIP, "wheel", *options, "."], folder / "source")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment with the wheel and, behind it, the tests' own packages."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
    scripts = folder / SCRIPTS
    install = ("install", "--no-deps", "--no-index", "--quiet", str(wheel))
    run([*PIP, "--python", str(scripts / "python"), *install], folder)
    # Added as plain folders: their own .pth files, an editable install's too, are not read.
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run([str(scripts / "python"), "-c", where], folder).strip())
    paths = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "packages_of_the_tests.pth").write_text("\n".join(paths), encoding="utf-8")
    return scripts


@pytest.fixture
def command(environment: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs a script of the environment in an empty folder; its standard output."""

    def call(script: str, *arguments: object) -> str:
        variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        done = subprocess.run(
            [str(environment / script), *map(str, arguments)],
            cwd=tmp_path,
            env=variables | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_the_wheel_holds_the_core_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"easyref_core", "easyref"}
    known = {path.relative_to(PACK).as_posix() for path in PACK.glob("easyref_core/**/*.py")}
    assert {name for name in names if name.startswith("easyref_core/")} == known


def test_nothing_is_imported_from_the_repository(
    command: Callable[..., str], environment: Path
) -> None:
    program = (
        "import importlib.util, easyref_core; print(easyref_core.__file__);"
        "print(importlib.util.find_spec('workshop'), importlib.util.find_spec('nodes'))"
    )
    place, others = command("python", "-c", program).splitlines()
    assert Path(place).is_relative_to(environment.parent)
    assert others == "None None"


def test_inspect_and_encode_give_the_golden_results(
    command: Callable[..., str], tmp_path: Path
) -> None:
    assert re.search(r"reference tokens +16\b", command("easyref", "inspect", goldens.ADAPTER))
    case = "one_ref_prompt"
    options = {"adapter": goldens.ADAPTER, "mllm": goldens.MLLM, "image-size": goldens.IMAGE_SIZE}
    options |= {"prompt": goldens.user_prompt(case), "out": tmp_path / "tokens.safetensors"}
    reference = goldens.GOLDEN / "refs" / "ref_0.png"
    command("easyref", "encode", *(f"--{n}={v}" for n, v in options.items()), reference)
    tokens = load_tokens(tmp_path / "tokens.safetensors").cond
    assert goldens.difference(tokens, goldens.expected()[f"full.{case}.tokens"]) <= 1e-4


@pytest.mark.timeout(900)  # imports and training in a new process, on a busy computer
def test_train_runs_two_steps(
    command: Callable[..., str], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    printed = command("easyref", "train", recipe(optimiser_steps=2))
    adapter = tmp_path / "run" / "easyref.safetensors"
    assert printed.split() == [str(adapter)]
    losses = (tmp_path / "run" / "losses.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in losses] == [1, 2]
    assert re.search(r"reference tokens +4\b", command("easyref", "inspect", adapter))
