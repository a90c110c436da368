"""Other node packs from their checkouts in ComfyUI's custom_nodes, for tests beside the real ones.

EASYREF_OTHER_PACKS   another folder with the checkouts
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from workshop.comfyui.find_comfyui import find_comfyui

# SDXL's attention slots in the order in which IP-Adapter's files number them.
SLOTS: Sequence[tuple[str, int, int]] = [
    *(("input", block, n) for block in (4, 5, 7, 8) for n in range(2 if block < 7 else 10)),
    *(("output", block, n) for block in range(6) for n in range(2 if block > 2 else 10)),
    *(("middle", 1, n) for n in range(10)),
]
WIDTH = 2048  # of SDXL's text; packs know SDXL by it


class _Anything(ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


class _Pretend(MetaPathFinder, Loader):
    """Finds packages that are not there."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        known = name.partition(".")[0] in self._packages
        return ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def load_pack(folder: str, pretended: Sequence[str] = ()) -> ModuleType:
    """Import a pack as ComfyUI does, or skip the test where there is no checkout.

    Args:
        pretended: packages that it imports, does not need for what is tested, and that are
            hard to install.
    """
    comfyui = find_comfyui()
    assert comfyui is not None
    root = Path(os.environ.get("EASYREF_OTHER_PACKS", comfyui / "custom_nodes")) / folder
    if not (root / "__init__.py").is_file():
        pytest.skip(f"no {folder} in {root.parent}")
    name = "pack_" + folder.replace("-", "_")
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        name, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    finder = _Pretend(pretended)
    sys.modules[name] = module
    sys.meta_path.append(finder)  # last: installed packages come first
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.meta_path.remove(finder)
        for module_name in set(sys.modules) - before:
            if isinstance(sys.modules[module_name], _Anything):
                del sys.modules[module_name]
    return module


def attention_weights(unet: Any) -> dict[str, torch.Tensor]:
    """Random `to_k_ip` and `to_v_ip` for every slot of SDXL, as wide as the UNet's layers are.

    Slots that a small UNet lacks get tiny ones.
    """
    noise = torch.Generator().manual_seed(8)
    widths = _widths(unet)
    return {
        f"{2 * number + 1}.to_{part}_ip.weight": 0.05
        * torch.randn((widths.get(slot, 1), WIDTH), generator=noise)
        for number, slot in enumerate(SLOTS)
        for part in "kv"
    }


def _widths(unet: Any) -> Mapping[tuple[str, int, int], int]:
    model = unet.model.diffusion_model
    blocks = {
        **{("input", i): block for i, block in enumerate(model.input_blocks)},
        **{("output", i): block for i, block in enumerate(model.output_blocks)},
        ("middle", 1): [model.middle_block[1]],
    }
    return {
        (*place, number): layer.attn2.to_k.weight.shape[0]
        for place, block in blocks.items()
        for part in block
        for number, layer in enumerate(getattr(part, "transformer_blocks", ()))
    }
