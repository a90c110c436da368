"""What a run writes beside its checkpoints, and what it must not replace."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..adapter.checkpoint import is_adapter
from ..errors import EasyRefError
from ..files import check_output, is_within, new_name
from ..untrusted import escaped, open_regular
from .checkpoints import list_checkpoints
from .config import Settings
from .disk import writing
from .progress import LOSSES

_RESULTS = ("easyref.safetensors", "easyref_ema.safetensors")
_FOLDERS = ("validation", "logs")


def check_results(settings: Settings, overwrite: bool) -> None:
    """Check what a run will write into output.folder, before anything is loaded.

    Args:
        overwrite: whether results that are there may be replaced: they are the run's own, which is
            resumed, or that was asked for.

    Raises:
        EasyRefError: results would be replaced that may not be, files of another kind, or what the
            run reads.
    """
    folder, model, data = Path(settings.output.folder), settings.model, settings.data
    read = [model.base, model.mllm, model.adapter, *data.files, settings.output.validation]
    written = [*(folder / name for name in (*_RESULTS, LOSSES, *_FOLDERS))]
    written += [checkpoint for _, checkpoint in list_checkpoints(folder)]
    for source in filter(None, read):
        for path in written:
            if is_within(Path(source), path):
                raise EasyRefError(
                    f"{escaped(source)} is read by this run, which would replace or remove "
                    f"{escaped(str(path))}. Choose another output.folder."
                )
    models = (model.base, model.mllm)
    for name in _RESULTS:
        check_output(folder / name, "an EasyRef adapter", is_adapter, models, overwrite)
    check_output(folder / LOSSES, "losses of a run", _has_losses, models, overwrite=True)


def _has_losses(path: Path) -> bool:
    with open_regular(path) as file:
        first = file.readline(1000)
    try:
        return not first or "loss" in json.loads(first)
    except (ValueError, TypeError):
        return not first.endswith(b"\n")  # cut while it was written


def keep_logs(folder: Path) -> None:
    """Rename what a run before has logged and has no checkpoint for, so that it is not lost."""
    for name in (LOSSES, "validation"):
        path = folder / name
        if os.path.lexists(path):
            with writing(path):
                path.rename(new_name(path))
