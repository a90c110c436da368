"""CLIP and DINO of EasyRef Score under ComfyUI's memory management."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image

from ...easyref_core.demo_set import read_stored_weights, score_model
from ...easyref_core.errors import EasyRefError
from ...easyref_core.evaluation.metrics.embedders import (
    CLIP,
    DINO,
    PictureEmbedder,
    open_clip,
    open_dino,
)
from ...easyref_core.evaluation.metrics.model_directory import ModelKind, read_weights
from .folders import file_stamps
from .out_of_memory import lack_of_memory
from .patcher import new_patcher

_OPENERS: dict[ModelKind, Callable[..., PictureEmbedder]] = {CLIP: open_clip, DINO: open_dino}
_WORKING_BYTES = 2**28  # of one picture in CLIP ViT-L/14, which takes a fifth of it

_lock = threading.Lock()
# The last model of each kind, with what it was read from: graphs that search score many times.
_held: dict[str, tuple[Any, ModelPatcher]] = {}


def embed(
    kind: ModelKind,
    directory: Path,
    pictures: Sequence[Image.Image],
    text: str,
    report: Callable[[], None],
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Embed pictures with a model, on its device, in float32.

    Args:
        text: embedded too, by CLIP; empty for none.
        report: called after each picture.

    Returns:
        (a unit vector [W] for each picture, that of the text), on the CPU.

    Raises:
        EasyRefError: the model cannot be used, see `open_clip`; not enough memory, and then
            everything is unloaded.
    """
    with _lock:
        try:
            patcher = _patcher(kind, directory)
            mm.load_models_gpu([patcher], memory_required=_WORKING_BYTES)
            embedder: Any = patcher.model
            found = []
            for picture in pictures:
                found.append(embedder.picture(picture))
                report()
            return found, embedder.text(text) if text and kind is CLIP else None
        except Exception as error:
            reason = lack_of_memory(error)
            if reason is None:
                raise
        # Outside the except block, where the traceback no longer holds the tensors.
        _held.clear()
        mm.unload_all_models()
        mm.soft_empty_cache()
        raise EasyRefError(
            f"Not enough memory to score pictures with {kind.name} ({reason}). Everything was "
            "unloaded; the graph can be queued again. Choose a smaller model."
        )


def _patcher(kind: ModelKind, directory: Path) -> ModelPatcher:
    key = (directory, file_stamps(directory))
    held = _held.get(kind.name)
    if held is None or held[0] != key:
        _held.pop(kind.name, None)  # before memory is taken for the next one
        read = read_stored_weights if directory == score_model(kind.name) else read_weights
        embedder = _OPENERS[kind](directory, directory.name, read=read)
        device, offload = mm.text_encoder_device(), mm.text_encoder_offload_device()
        # transformers' layers hold their weights in memory: nothing to load dynamically.
        held = _held[kind.name] = (key, new_patcher(embedder, device, offload, True))
    return held[1]
