"""The text encoders as a model set stores them: word tables that may be cut down."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging

from easyref_core.demo_set import read_stored_weights

from .pretraining.text_encoders import LoadedText, Tokenizers, load_tokenizers, write_tokenizers

_CLIPS: dict[str, Any] = {"clip_l": CLIPTextModel, "clip_g": CLIPTextModelWithProjection}


def load_text(directory: Path) -> LoadedText:
    """The text encoders of a set, in float32, with tokenizers.

    Args:
        directory: `text_encoders` of the set.

    Raises:
        OSError, ValueError, RuntimeError, KeyError, SafetensorError: as `load_stored`.
    """
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="easyref_words_") as scratch:
        write_tokenizers(Path(scratch))
        tokenizers = load_tokenizers(Path(scratch))
    # Not from_pretrained of the folder: the stored word table may be cut down.
    stored = {n: read_stored_weights(directory / n / "model.safetensors") for n in _CLIPS}
    return text_with_weights(tokenizers, directory, stored)


def text_with_weights(
    tokenizers: Tokenizers, directory: Path, weights: Mapping[str, Mapping[str, torch.Tensor]]
) -> LoadedText:
    """Text encoders with the configurations in a set's `text_encoders`."""
    encoders = []
    for name, kind in _CLIPS.items():
        config = CLIPTextConfig.from_pretrained(directory / name, local_files_only=True)
        whole: Any = {"state_dict": dict(weights[name]), "torch_dtype": torch.float32}
        encoders.append(kind.from_pretrained(None, config=config, **whole).eval())
    return LoadedText(tokenizers, *encoders)
