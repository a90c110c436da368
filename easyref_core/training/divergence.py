"""What is said where a loss or a weight is no longer a number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import EasyRefError
from ..files import new_name, write_atomically
from .disk import writing
from .samples import Sample

_REMEDY = "Lower optimiser.learning_rate or set max_grad_norm, and resume from the last checkpoint."


def infinite_weight(model: torch.nn.Module) -> str | None:
    """Name of a weight that holds NaN or infinities; None if there is none."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight.detach()).all():
            return name
    return None


def check_weights(model: torch.nn.Module, step: int) -> None:
    """Keep what cannot be trained on from being saved.

    Raises:
        EasyRefError: a weight holds NaN or infinities after a step.
    """
    name = infinite_weight(model)
    if name is not None:
        raise EasyRefError(
            f"After step {step} the weight {name} holds values that are not numbers, so no "
            f"checkpoint was written. {_REMEDY}"
        )


def loss_error(
    model: torch.nn.Module | None,
    samples: Sequence[Sample],
    step: int,
    is_first: bool,
    path: Path,
) -> EasyRefError:
    """The error for a loss that is not a number; writes the batch's records into a new file.

    Args:
        model: whose weights may be the reason; None where no process holds them all.
        is_first: whether the weights are as they were loaded.
        path: of the file.
    """
    path = new_name(path)
    batch = [{"record": s.record, "position": s.position, "text": s.text} for s in samples]
    text = json.dumps(batch, indent=2)
    with writing(path):
        write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
    said = f"The loss of step {step} is not a number. The batch's records are in {path}."
    weight = None if model is None else infinite_weight(model)
    if weight is None:
        remedy = _REMEDY[0].lower() + _REMEDY[1:]
        return EasyRefError(f"{said} Look at them, {remedy}")
    said += f" The weight {weight} holds values that are not numbers,"
    if is_first:
        return EasyRefError(
            f"{said} as it was loaded: get model.base, model.mllm or model.adapter again, to "
            "whichever it belongs."
        )
    return EasyRefError(f"{said} so it is not the data. {_REMEDY}")
