"""The packages import downwards only, and the core is light to import and free of any host."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import easyref_core

CORE = Path(easyref_core.__file__).parent
ROOT = CORE.parent
# Lowest first; modules and subpackages of one layer do not import each other.
LAYERS = (
    ("errors",),
    ("untrusted",),
    ("files", "attention_kernels", "devices", "extras", "out_of_memory"),
    ("pictures", "weight_file"),
    ("qwen2vl", "tokens", "demo_set"),
    ("adapter",),
    ("encode", "sdxl_diffusers"),
    ("training",),
    ("evaluation",),
    ("cli",),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
SOURCES = sorted(CORE.rglob("*.py"))
SHIPPED = [*SOURCES, *sorted((ROOT / "nodes").rglob("*.py")), ROOT / "__init__.py"]
# Without training, which needs an extra.
LIGHT = [s for s in SOURCES if s.parent.name not in ("training", "sdxl_diffusers")]
HOSTS = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "server", "execution"}
NOT_SHIPPED = {"workshop", "tests", "benchmarks"}


def identifier(source: Path) -> str:
    return source.relative_to(ROOT).as_posix()


def imports(source: Path) -> set[str]:
    """Dotted names of all that a file imports, within functions too; its own from the root on."""
    package = source.relative_to(ROOT).parent.parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= len(package) + 1, f"{source}: an import leaves the project"
            start = package[: len(package) + 1 - node.level] if node.level else ()
            module = (*start, *((node.module or "").split(".") if node.module else ()))
            found |= {".".join((*module, alias.name)) for alias in node.names}
    return found


def test_the_scan_finds_imports() -> None:
    assert len(LIGHT) > 15
    assert "easyref_core.errors.EasyRefError" in imports(CORE / "weight_file" / "file.py")
    assert "easyref_core.qwen2vl.config.MllmConfig" in imports(CORE / "encode" / "encoder.py")
    assert "transformers.AutoTokenizer" in imports(CORE / "qwen2vl" / "tokenizer_files.py")


@pytest.mark.parametrize("source", SOURCES, ids=identifier)
def test_the_core_imports_no_host(source: Path) -> None:
    assert not {name.split(".")[0] for name in imports(source)} & HOSTS


@pytest.mark.parametrize("source", SHIPPED, ids=identifier)
def test_what_ships_imports_nothing_that_does_not(source: Path) -> None:
    assert not {name.split(".")[0] for name in imports(source)} & NOT_SHIPPED


@pytest.mark.parametrize("source", SOURCES, ids=identifier)
def test_imports_run_downwards(source: Path) -> None:
    own = source.relative_to(CORE).with_suffix("").parts[0]
    if own == "__init__":  # public names, imported when they are used
        return
    used = {name.split(".")[1] for name in imports(source) if name.startswith("easyref_core.")}
    upwards = {name for name in used - {own} if LAYER_OF[name] >= LAYER_OF[own]}
    assert not upwards, f"{own} may not import {', '.join(sorted(upwards))}"


@pytest.mark.parametrize("source", SOURCES, ids=identifier)
def test_own_modules_are_imported_relatively(source: Path) -> None:
    """ComfyUI imports the core under another package's name."""
    assert not re.search(r"^\s*(from|import) easyref_core\b", source.read_text("utf-8"), re.M)


def test_no_two_classes_share_a_name() -> None:
    classes = Counter(
        node.name
        for source in SOURCES
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in classes.items() if count > 1] == []


def test_importing_loads_no_heavy_library() -> None:
    modules = [".".join(s.with_suffix("").relative_to(ROOT).parts) for s in LIGHT]
    code = (
        "import importlib, json, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert {"torch", "PIL", "easyref_core"} <= loaded
    assert not loaded & (HOSTS | {"transformers", "diffusers", "accelerate", "safetensors"})


def test_the_package_itself_loads_nothing() -> None:
    code = "import sys, easyref_core; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", easyref_core.__all__)
def test_public_names_are_defined_and_documented(name: str) -> None:
    assert getattr(easyref_core, name).__name__ == name
    assert name in dir(easyref_core)
    assert re.search(rf"\b{name}\b", easyref_core.__doc__)


def test_type_checkers_see_the_same_public_names() -> None:
    wanted = {f"easyref_core.{module}.{name}" for name, module in easyref_core._HOME.items()}
    found = imports(CORE / "__init__.py")
    assert {name for name in found if name.startswith("easyref_core.")} == wanted


def test_other_names_are_not_public() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        easyref_core.nothing  # noqa: B018
