"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .model import TrainedModel


class Average:
    """Averages of every trained parameter, by official name, in float32."""

    def __init__(self, model: TrainedModel, decay: float) -> None:
        self._decay = decay
        self.weights = {
            model.official_name(name): p.detach().float().clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }

    @torch.no_grad()
    def update(self, model: TrainedModel) -> None:
        """Move every average a step towards the weight."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                average = self.weights[model.official_name(name)]
                average.lerp_(parameter.detach().float(), 1 - self._decay)

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from saved averages."""
        for name, average in self.weights.items():
            average.copy_(state[name].reshape(average.shape))
