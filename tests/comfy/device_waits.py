"""Finds what makes the host wait for the device, by line of the pack."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyhost import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

WAITING_METHODS = (
    "item",
    "cpu",
    "tolist",
    "numpy",
    "nonzero",
    "__bool__",
    "__float__",
    "__int__",
    "to",
)
WAITING_OPERATIONS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")


def called_by_the_pack(comfyui: Path) -> str | None:
    """The line of the pack that is nearest on the stack, if none of ComfyUI's is nearer."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith((str(ROOT / "nodes"), str(ROOT / "easyref_core"))):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}"
        if name.startswith(str(comfyui)):
            return None
        frame = frame.f_back
    return None


class _Operations(TorchDispatchMode):
    """Notes waits that no method shows, such as indexing with a mask."""

    def __init__(self, comfyui: Path, result: list[str]) -> None:
        super().__init__()
        self._comfyui, self._found = comfyui, result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        line = called_by_the_pack(self._comfyui) if name in WAITING_OPERATIONS else None
        if line:
            self._found.append(f"{name} at {line}")
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(comfyui: Path) -> Iterator[list[str]]:
    """Every place of the pack that makes the host wait for the device, or moves a tensor."""
    result: list[str] = []

    def watched(name: str) -> Any:
        own = getattr(torch.Tensor, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            moves = any(isinstance(a, (str, torch.device)) for a in (*args[1:], *kwargs.values()))
            line = called_by_the_pack(comfyui) if moves or name != "to" else None
            if line:
                result.append(f"{name} at {line}")
            return own(*args, **kwargs)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for name in (*WAITING_METHODS, "to"):
            patch.setattr(torch.Tensor, name, watched(name))
        with _Operations(comfyui, result):
            yield result
