"""Weight files, read as ComfyUI reads its own models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import comfy.utils

from ...easyref_core.weight_file import GetTensor, WeightFile
from .patcher import loads_dynamically

_SUFFIXES = (".safetensors", ".sft")  # by which ComfyUI recognises the format


class HostWeightFile(WeightFile):
    """A weight file of a model that ComfyUI may load dynamically.

    Its own reader then leaves weights in their file until a layer uses them, and moves them
    directly to the GPU; whoever uses them checks before that the file is unchanged. All other
    weights are copied into memory.
    """

    @classmethod
    def of(cls, file: WeightFile) -> HostWeightFile:
        """The same file."""
        values = {field.name: getattr(file, field.name) for field in fields(file)}
        return cls(**values | {"shards": tuple(map(cls.of, file.shards))})

    @contextmanager
    def _tensors(self) -> Iterator[GetTensor]:
        if loads_dynamically() and self.is_safetensors and self.path.suffix.lower() in _SUFFIXES:
            self.check_unchanged()
            tensors = comfy.utils.load_torch_file(str(self.path))
            yield lambda name, rows=None: tensors[name][:rows] if rows else tensors[name]
        else:
            with super()._tensors() as get:
                yield get
