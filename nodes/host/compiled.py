"""Compiled models run uncompiled while references act.

ComfyUI's compile node drops every guard on `transformer_options`, where attention patches travel:
a trace keeps the patches of the call that made it, or their absence, and later calls get those
without a word. A guarded keyword argument that names the patches is no way out: at the first graph
break PyTorch traces the inner modules by themselves, and they never see it.
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
    placed = patcher.object_patches.values() if patcher is not None else ()
    # Other nodes compile parts of the model: into modules that hold the originals, or in place.
    return bool(wrappers) or any(
        hasattr(one, "_orig_mod") or getattr(one, "_compiled_call_impl", None) is not None
        for one in (model.diffusion_model, *placed)
    )


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled modules that are called inside run as they were written.

    PyTorch has one stance for the whole process, and each GPU may call from a thread of its own:
    the first caller changes the stance and the last one restores it.
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
