"""What concerns one trial, and what concerns all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...errors import EasyRefError
from ...out_of_memory import lack_of_memory


class MethodError(EasyRefError):
    """What concerns all trials of a method, so that none is marked for it."""


@contextmanager
def concerns_all(what: str) -> Iterator[None]:
    """Turn what is refused inside, and a lack of memory, into MethodError.

    Args:
        what: does not fit into memory.
    """
    try:
        yield
    except Exception as error:
        reason = lack_of_memory(error)
        if reason is not None:
            raise MethodError(
                f"There is not enough memory for {what} ({reason}). Use a 16-bit dtype or another "
                "device."
            ) from error
        if isinstance(error, EasyRefError):
            raise MethodError(str(error)) from error
        raise


def why(error: Exception, device: torch.device, what: str) -> str:
    """What an error says of one trial; other errors are raised again.

    Args:
        what: was to be done, such as "sample the image".
    """
    reason = lack_of_memory(error)
    if reason is not None:
        return (
            f"{device} has not enough memory to {what} ({reason}). Use a smaller batch, fewer "
            "references, a smaller size or a 16-bit dtype."
        )
    if isinstance(error, EasyRefError) and not isinstance(error, MethodError):
        return str(error)
    raise error
