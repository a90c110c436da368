"""Files that a run writes: whole or not at all, with a sentence where the disk refuses them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import EasyRefError
from ..files import write_atomically


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """
    Raises:
        EasyRefError: the disk is full or not writable.
    """
    try:
        yield
    except (EasyRefError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    # safetensors reports a full disk with its own exception class, FSDP's shards with one that is
    # not an Exception.
    except BaseException as error:
        raise EasyRefError(
            f"{path} could not be written ({error}). Earlier checkpoints are intact; free some "
            "space and start the command again to resume."
        ) from error


def save_weights(
    state: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        EasyRefError: the disk is full or not writable; nothing is left behind.
    """
    from safetensors.torch import save_file

    entries = {"format": "pt", **(metadata or {})}
    with writing(path):
        write_atomically(path, lambda partial: save_file(dict(state), partial, entries))
