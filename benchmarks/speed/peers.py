"""IP-Adapter Plus (cubiq/ComfyUI_IPAdapter_plus) on the same UNet, with random weights.

Its own attention patch is loaded from a checkout; what is built here is what its nodes would hand
it: embeddings of so many tokens, and the projections of each layer.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

TOKENS = (16, 64)
_NAME = "ipadapter_plus"
_WIDTH = 2048
_ALWAYS = {"sigma_start": 1e9, "sigma_end": 0.0}


def load_patch(folder: Path) -> ModuleType:
    """Its module with the attention patch; ComfyUI must be imported before.

    Raises:
        SystemExit: the folder is no checkout of it.
    """
    if not (folder / "CrossAttentionPatch.py").is_file():
        raise SystemExit(f"{folder} has no CrossAttentionPatch.py: --ipadapter needs a checkout.")
    # A package of that folder without its __init__, whose nodes need more than the patch does.
    spec = importlib.util.spec_from_loader(_NAME, loader=None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(folder)]
    sys.modules[_NAME] = package
    return importlib.import_module(f"{_NAME}.CrossAttentionPatch")


class IpAdapter:
    """Its attention patch with random weights.

    Args:
        layers: those of `cross_attention_layers`.
    """

    def __init__(self, patch: ModuleType, layers: Mapping[str, Any]) -> None:
        self._patch = patch
        generator = torch.Generator().manual_seed(5)
        self._keys = {found.block: str(2 * n + 1) for n, found in enumerate(layers.values())}
        projections = torch.nn.ModuleDict()
        for found in layers.values():
            width, context = found.widths
            for part in ("to_k_ip", "to_v_ip"):
                linear = torch.nn.Linear(context, width, bias=False)
                noise = torch.randn(width, context, generator=generator)
                linear.weight.copy_(noise * context**-0.5)
                projections[f"{self._keys[found.block]}_{part}"] = linear
        self._adapter = SimpleNamespace(ip_layers=SimpleNamespace(to_kvs=projections))
        self._adapter.get_multigpu_clone = lambda device: self._adapter

    def apply(self, model: Any, tokens: int, masks: tuple[torch.Tensor | None, ...]) -> Any:
        """A copy of the model with one use of it for each mask."""
        generator = torch.Generator().manual_seed(tokens)
        steered = model.clone()
        given = [
            {
                "ipadapter": self._adapter,
                "cond": torch.randn(1, tokens, _WIDTH, generator=generator),
                "uncond": torch.randn(1, tokens, _WIDTH, generator=generator),
                "mask": mask,
                **_ALWAYS,
            }
            for mask in masks
        ]
        for block, key in self._keys.items():
            first, *others = ({"module_key": key, **one} for one in given)
            slot = self._patch.Attn2Replace(self._patch.ipadapter_attention, **first)
            for one in others:
                slot.add(self._patch.ipadapter_attention, **one)
            steered.set_model_attn2_replace(slot, *block)
        return steered
