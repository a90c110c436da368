"""Seconds in the attention slots of a pack."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class Slots:
    """Times what a pack puts on ComfyUI's attention slots, without the text's attention in it,
    which a plain model computes too.

    Args:
        module: of the pack; its `optimized_attention` is the text's, where a slot first calls it.
        kind: the class of what stands on the slots.
    """

    def __init__(self, module: ModuleType, kind: type) -> None:
        self._module, self._kind = module, kind
        self.seconds = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        attend, call = self._module.optimized_attention, self._kind.__call__
        of_text: list[float] = []

        def attention(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return attend(*args, **kwargs)
            finally:
                of_text.append(time.process_time() - start)

        def slot(self_: Any, *args: Any, **kwargs: Any) -> Any:
            of_text.clear()
            start = time.process_time()
            try:
                return call(self_, *args, **kwargs)
            finally:
                self.seconds += time.process_time() - start - of_text[0]

        self._module.optimized_attention, self._kind.__call__ = attention, slot
        try:
            yield
        finally:
            self._module.optimized_attention, self._kind.__call__ = attend, call
