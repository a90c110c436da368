"""Generate the images of trials, batch by batch; what cannot be made is marked."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ..errors import EasyRefError
from ..out_of_memory import lack_of_memory
from .methods import Generated, Method
from .store import RunFolder
from .trials import Trial

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


def generate(
    methods: Mapping[str, Method],
    batches: Sequence[Sequence[Trial]],
    folder: RunFolder,
    show: Callable[[int], object] = lambda count: None,
) -> None:
    """Make the images that are missing. A batch of which one is missing, or failed before, is made
    again as a whole.

    Args:
        methods: by name, ready for use one after the other.
        show: called with the number of images that are finished, also by an earlier run.

    Raises:
        EasyRefError: the disk is full or not writable.
    """
    work = folder.path / "work"
    for name, method in methods.items():
        try:
            for batch in batches:
                if batch[0].variant.method != name:
                    continue
                if not all(_is_done(folder, trial) for trial in batch):
                    for trial, result in zip(batch, _made(method, batch, work), strict=True):
                        folder.save(trial, result)
                show(len(batch))
        finally:
            method.close()


def _is_done(folder: RunFolder, trial: Trial) -> bool:
    state = folder.state(trial)
    return state is not None and state.status == "done"


def _made(method: Method, batch: Sequence[Trial], work: Path) -> list[Generated]:
    reason = None
    try:
        return method.generate(batch, work)
    except EasyRefError as error:
        if concerns_disk(error):
            raise
        return [Generated(None, error=str(error))] * len(batch)
    except Exception as error:
        reason = lack_of_memory(error)
        if reason is None:
            raise
    free_memory()  # outside of `except`, which keeps the failed call's tensors
    if len(batch) > 1:
        return [result for trial in batch for result in _made(method, [trial], work)]
    return [Generated(None, error=f"There is not enough memory ({reason}).")]


def free_memory() -> None:
    """What a failed call has left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def concerns_disk(error: BaseException | None) -> bool:
    """Whether an error comes from a disk that is full or cannot be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK:
            return True
        error = error.__cause__ or error.__context__
    return False
