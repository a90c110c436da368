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
    """A weight file that follows ComfyUI's command line options.

    With dynamic loading, ComfyUI's own reader leaves weights in their file until a layer uses
    them, then moves them directly to the GPU. With `--disable-mmap` weights are copied out of the
    mapping.
    """

    @classmethod
    def of(cls, file: WeightFile) -> HostWeightFile:
        """The same file."""
        return cls(**{field.name: getattr(file, field.name) for field in fields(file)})

    @contextmanager
    def open(self) -> Iterator[GetTensor]:
        """See `WeightFile.open`."""
        if loads_dynamically() and self.is_safetensors and self.path.suffix.lower() in _SUFFIXES:
            self.check_unchanged()
            yield comfy.utils.load_torch_file(str(self.path)).__getitem__
            return
        with super().open() as get:
            yield (lambda name: get(name).clone()) if comfy.utils.DISABLE_MMAP else get
