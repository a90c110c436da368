"""What a run says when it cannot write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import EasyRefError


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
    # safetensors reports a full disk as its own exception, FSDP's shards as what is no Exception.
    except BaseException as error:
        raise EasyRefError(
            f"{path} could not be written ({error}). Earlier checkpoints are intact; free some "
            "space and start the command again to resume."
        ) from error
