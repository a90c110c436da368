"""Models that went through `torch.compile`, by ComfyUI's TorchCompileModel or a like node.

The compile node drops all guards on `transformer_options`, which holds attention patches: a trace
contains the patches of the call that was traced, or none, and later calls silently use those. So a
call with references never uses the node's own traces. It is compiled apart, with the node's
settings, or runs uncompiled.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP, get_wrappers_with_key
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, TORCH_COMPILE_KWARGS

UNET = "diffusion_model"
"""ComfyUI's name of the UNet in a `BaseModel`."""

_lock = threading.Lock()
_stance = ExitStack()
_callers = 0
_compiled: weakref.WeakKeyDictionary[Any, CompiledFunction] = weakref.WeakKeyDictionary()


class CannotCompile(Exception):
    """A call that has to run uncompiled, and why."""


def is_compiled(model: Any, transformer_options: Mapping[str, Any]) -> bool:
    """Whether a model call goes through `torch.compile`.

    Args:
        model: ComfyUI's `BaseModel`.
    """
    return bool(_compile_wrappers(transformer_options)) or _is_compiled_otherwise(model)


def compiled_as(
    model: Any, transformer_options: Mapping[str, Any], function: Callable[..., Any]
) -> tuple[Any, CompiledFunction]:
    """(the UNet itself, `function` compiled with the settings with which TorchCompileModel compiled
    the UNet).

    Args:
        model: ComfyUI's `BaseModel`.
        function: always the same one; guards on its argument `transformer_options` are dropped.

    Raises:
        CannotCompile: it was compiled in another way, or with CUDA graphs.
    """
    wrappers = _compile_wrappers(transformer_options)
    modules = _modules_of(wrappers[0]) if len(wrappers) == 1 else {}
    patcher = model.current_patcher
    settings = None if patcher is None else patcher.model_options.get(TORCH_COMPILE_KWARGS)
    unet = getattr(modules.get(UNET), "_orig_mod", None)
    if set(modules) != {UNET} or settings is None or hasattr(unet, "_orig_mod"):
        raise CannotCompile("another node compiled it, or compiled parts of it")
    if _is_compiled_otherwise(model, but=modules[UNET]):
        raise CannotCompile("another node compiled parts of it as well")
    with _lock:
        found = _compiled.get(modules[UNET])
        if found is None:
            found = _compiled[modules[UNET]] = CompiledFunction(function, settings)
    return unet, found


class CompiledFunction:
    """A function compiled in one piece: PyTorch would trace the modules inside by themselves
    elsewhere, shared between the UNet's blocks, which `transformer_options` tells apart.

    Args:
        settings: arguments of `torch.compile`.

    Raises:
        CannotCompile: with these settings CUDA graphs would be used.
    """

    def __init__(self, function: Callable[..., Any], settings: Mapping[str, Any]) -> None:
        settings = _with_options(settings)
        if _uses_cuda_graphs(settings):
            raise CannotCompile("its CUDA graphs would keep the references of their first run")
        self._compiled = torch.compile(function, **settings)
        self._failed = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            CannotCompile: PyTorch could not, before anything was computed.
        """
        if self._failed:
            raise CannotCompile(self._failed)
        try:
            return self._compiled(*args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:  # what is compiled still serves
            raise CannotCompile("PyTorch compiled it for too many different inputs") from error
        except torch._dynamo.exc.TorchDynamoException as error:
            said = str(error).strip().partition("\n")[0]
            self._failed = f"PyTorch cannot compile it in one piece: {said}"
            raise CannotCompile(self._failed) from error


@contextmanager
def uncompiled(reason: str) -> Iterator[None]:
    """Run compiled modules eagerly inside.

    PyTorch has one stance for the whole process, and several threads may be inside at once: the
    first changes the stance and the last restores it.

    Args:
        reason: why, for the log, which says it once.
    """
    global _callers
    _warn_once(reason)
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


@lru_cache(maxsize=32)
def _warn_once(reason: str) -> None:
    logging.warning(
        "EasyRef: the model is compiled (TorchCompileModel or a like node), but with references it "
        "runs uncompiled, exact and at its usual speed: %s.",
        reason,
    )


def _compile_wrappers(transformer_options: Mapping[str, Any]) -> list[Any]:
    found = get_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY, transformer_options)
    return list(dict.fromkeys(found))  # for a run inside a run, ComfyUI adds them once more


def _is_compiled_otherwise(model: Any, but: Any = None) -> bool:
    """Other nodes compile parts of the model: into modules that wrap the originals, or in place."""
    patcher = model.current_patcher
    replaced = patcher.object_patches.values() if patcher is not None else ()
    unet = getattr(model, UNET)
    modules = (getattr(unet, "_orig_mod", unet) if unet is but else unet, *replaced)
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in modules
    )


def _modules_of(wrapper: Callable[..., Any]) -> Mapping[str, Any]:
    """Name in the `BaseModel` -> module that ComfyUI's wrapper puts there, empty for another's."""
    code, cells = getattr(wrapper, "__code__", None), getattr(wrapper, "__closure__", None)
    if code is None or cells is None:
        return {}
    kept = {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
    return kept.get("compiled_module_dict", {})


def _with_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for the whole in one piece, with guards as for TorchCompileModel; `torch.compile`
    takes either a mode or options."""
    mode, options = settings.get("mode"), dict(settings.get("options") or {})
    if mode not in (None, "default"):
        if settings.get("backend") != "inductor":
            raise CannotCompile(f"its mode {mode} is for another backend than inductor")
        from torch._inductor import list_mode_options

        options = list_mode_options(mode, settings.get("dynamic")) | options
    options["guard_filter_fn"] = _without_options
    return {**settings, "mode": None, "options": options, "fullgraph": True}


def _uses_cuda_graphs(settings: Mapping[str, Any]) -> bool:
    if settings.get("backend") != "inductor":
        return settings.get("backend") == "cudagraphs"
    from torch._inductor import config

    return settings["options"].get("triton.cudagraphs", config.triton.cudagraphs)


def _without_options(guards: list[Any]) -> list[bool]:
    return ["transformer_options" not in guard.name for guard in guards]
