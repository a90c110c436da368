"""Weight files, read the way ComfyUI reads its own models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import comfy.utils

from ...easyref_core.weight_file import GetTensor, WeightFile
from .patcher import loads_dynamically

_NAMES = (".safetensors", ".sft")  # by which ComfyUI knows the format


class HostWeightFile(WeightFile):
    """A weight file that heeds how ComfyUI was started.

    Where it loads models dynamically, its own reader leaves weights in their file until a layer
    uses them, then moves them straight to the GPU. With `--disable-mmap` no weight that is kept
    stays mapped to the file.
    """

    @classmethod
    def of(cls, file: WeightFile) -> HostWeightFile:
        """The same file."""
        return cls(**{field.name: getattr(file, field.name) for field in fields(file)})

    @contextmanager
    def open(self) -> Iterator[GetTensor]:
        """See `WeightFile.open`."""
        if loads_dynamically() and self.is_safetensors and self.path.suffix.lower() in _NAMES:
            self.check_unchanged()
            yield comfy.utils.load_torch_file(str(self.path)).__getitem__
            return
        with super().open() as get:
            yield (lambda name: get(name).clone()) if comfy.utils.DISABLE_MMAP else get
