"""Compiled models run uncompiled while references act.

ComfyUI's compile node drops all guards on `transformer_options`, which holds attention patches: a
trace contains the patches of the call that was traced, or none, and later calls silently use those.
A guarded keyword argument that names the patches does not help: after a graph break PyTorch traces
the inner modules by themselves, without it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP, get_wrappers_with_key
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

_lock = threading.Lock()
_stance = ExitStack()
_callers = 0


def is_compiled(model: Any, transformer_options: Mapping[str, Any]) -> bool:
    """Whether a model call goes through `torch.compile`.

    Args:
        model: ComfyUI's `BaseModel`.
    """
    wrappers = get_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY, transformer_options)
    patcher = model.current_patcher
    replaced = patcher.object_patches.values() if patcher is not None else ()
    # Other nodes compile parts of the model: into modules that wrap the originals, or in place.
    return bool(wrappers) or any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in (model.diffusion_model, *replaced)
    )


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled modules eagerly inside.

    PyTorch has one stance for the whole process, and several threads may be inside at once: the
    first changes the stance and the last restores it.
    """
    global _callers
    _warn_once()
    with _lock:
        if _callers == 0:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
        _callers += 1
    try:
        yield
    finally:
        with _lock:
            _callers -= 1
            if _callers == 0:
                _stance.close()


@lru_cache(maxsize=1)
def _warn_once() -> None:
    logging.warning(
        "EasyRef: the model is compiled (TorchCompileModel or a like node). Compiled code would "
        "keep the references of its first run, so with references the model runs uncompiled, at "
        "its usual speed. Without them it stays compiled."
    )
