"""Which latents of the whole batch a model call works on.

Long videos are sampled in windows: ComfyUI's own context windows and AnimateDiff-Evolved call the
model with a few frames at a time, so what belongs to a frame must be looked up by its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Frames:
    """The latents of a model call.

    Attributes:
        total: latents of the whole batch.
        places: of this call's latents in it, None for all of them in order.
    """

    total: int
    places: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """Latents of this call."""
        return self.total if self.places is None else len(self.places)

    def pick(self, whole: torch.Tensor) -> torch.Tensor:
        """[total or 1, ...] -> [count, ...]; one for all is repeated without a copy."""
        if whole.shape[0] == 1:
            return whole.expand(self.count, *whole.shape[1:])
        if self.places is None:
            return whole
        return whole.index_select(0, _index(self.places, whole.device))


def frames_of_call(transformer_options: Mapping[str, Any], each: int) -> Frames:
    """The latents that a model call holds of each conditioning, `each` of them."""
    places, total = _window(transformer_options)
    if places is None or len(places) != each:
        return Frames(each)
    return Frames(max(total or 0, max(places) + 1), tuple(places))


def window_size(transformer_options: Mapping[str, Any]) -> int | None:
    """Latents in the window of frames that a model call is one of, None without windows."""
    places, _ = _window(transformer_options)
    return None if places is None else len(places)


def _window(options: Mapping[str, Any]) -> tuple[Sequence[int] | None, int | None]:
    window = options.get("context_window")  # of ComfyUI
    if window is not None and window.dim == 0:
        # Newer cores sample the frame before a window with it, and drop what comes of it.
        before = getattr(window, "causal_anchor_index", None)
        places = window.index_list if before is None else [before, *window.index_list]
        return places, window.total_frames
    told = options.get("ad_params") or {}  # of AnimateDiff-Evolved
    return told.get("sub_idxs"), told.get("full_length")


@lru_cache(maxsize=64)
def _index(places: tuple[int, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(places, device=device)
