"""The weight of a stage of the sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...easyref_core.adapter.stages import Window
from .weights import Curve, SamplingRange, Scale, Weight


@dataclass(frozen=True)
class StageWindow(Window, Weight):
    """A weight within a part of the sampling, which begins and ends as in EasyRef Apply and in
    ComfyUI's own nodes, or fades in and out."""

    def at_sigmas(self, model_sampling: Any, sigmas: torch.Tensor) -> Scale:
        if self.is_zero:
            return 0.0
        if self.fade > 0:
            return Curve(self.points).at_sigmas(model_sampling, sigmas)
        inside = SamplingRange(self.start, self.end).at_sigmas(model_sampling, sigmas)
        return inside if self.weight == 1 else inside * self.weight
