"""The core stays free of any host and light to import."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import easyref_core

ROOT = Path(easyref_core.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
# Without training and diffusers' UNet, which need an extra.
CORE = [s for s in SOURCES if s.parent.name not in ("training", "sdxl_diffusers")]
HOSTS = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "server", "execution"}


def identifier(source: Path) -> str:
    return source.relative_to(ROOT).as_posix()


def imports(source: Path) -> list[tuple[int, str]]:
    """(relative level, module) of every import in a file, within functions too."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def test_the_scan_finds_imports() -> None:
    assert len(CORE) > 15
    assert (1, "errors") in imports(ROOT / "weight_file.py")
    assert (0, "transformers") in imports(ROOT / "qwen2vl" / "prompt.py")


@pytest.mark.parametrize("source", SOURCES, ids=identifier)
def test_no_host_is_imported(source: Path) -> None:
    assert not {name.split(".")[0] for level, name in imports(source) if level == 0} & HOSTS


@pytest.mark.parametrize("source", SOURCES, ids=identifier)
def test_own_modules_are_imported_relatively_and_from_within(source: Path) -> None:
    depth = len(source.relative_to(ROOT).parts)
    for level, name in imports(source):
        assert name.split(".")[0] != "easyref_core", f"absolute import of {name}"
        assert level <= depth, f"{'.' * level}{name} leaves the package"


def test_importing_loads_no_heavy_library() -> None:
    modules = [".".join(s.with_suffix("").relative_to(ROOT.parent).parts) for s in CORE]
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
