"""Loading a checkpoint's files, with a sentence for whatever they lead to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import EasyRefError
from ..untrusted import escaped
from .engine import TrainableModule


@contextmanager
def restoring(folder: Path, fresh_start: str) -> Iterator[None]:
    """
    Args:
        fresh_start: how to train on from weights that cannot be resumed.

    Raises:
        EasyRefError: in place of whatever damaged files lead to.
    """
    try:
        yield
    except (EasyRefError, torch.cuda.OutOfMemoryError, KeyboardInterrupt, SystemExit):
        raise
    # Truncated files raise anything; shards, what is not an Exception.
    except BaseException as error:
        raise EasyRefError(
            f"{escaped(str(folder))} cannot be restored ({escaped(_one_line(error))}). It is "
            "damaged, or was made with other parts, sizes or processes than are trained now. Start "
            f"it as before, remove it to resume earlier, or {fresh_start}."
        ) from error


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, Exception):
        return f"{type(error).__name__}: {lines[0]}"
    return lines[-1]  # errors of shards hold each process's traceback


@torch.no_grad()
def load_weights(model: TrainableModule, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Copy saved weights into the parameters that are trained.

    Raises:
        EasyRefError: one is missing, or of another size.
    """
    for name, parameter in model.trained_parameters().items():
        weight = state.get(name)
        if weight is None or weight.numel() != parameter.numel():
            raise EasyRefError(f"{folder} does not fit: {name} is missing or of another size.")
        parameter.copy_(weight.reshape(parameter.shape))
