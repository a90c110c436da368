"""Parts that were trained apart from each other, from the same adapter, in one file.

For example the pools of `dla`, those of `lap` and the identity LoRA, each trained alone from the
adapter of the third stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..adapter.checkpoint import AdapterCheckpoint, is_adapter, load_checkpoint
from ..adapter.weights import official_weights
from ..errors import EasyRefError
from ..files import check_output
from ..untrusted import escaped, shown
from .disk import save_weights
from .model import part_of

_REMEDY = "Merge adapters whose new parts alone were trained from that adapter."
_NEW_PARTS = ("layer_pooling", "identity")  # which leave what was there as it is


def merge_adapters(
    base: str | Path, trained: Sequence[str | Path], to: str | Path, overwrite: bool = False
) -> Path:
    """Write the weights of `base` and what each of `trained` has beside them as one adapter.

    Args:
        base: the adapter that the others were trained from.
        trained: adapters that hold all of its weights unchanged, and new ones.
        to: a new file; may be none of the others.
        overwrite: whether an adapter that is there may be replaced.

    Returns:
        `to`.

    Raises:
        EasyRefError: an adapter whose weights or metadata are not those of `base`; two with
            different weights of one name; files that cannot be read or written.
    """
    to = Path(to)
    check_output(to, "an EasyRef adapter", is_adapter, (base, *trained), overwrite)
    start = load_checkpoint(base)
    own = official_weights(start)
    merged = start.file.read(own)
    metadata = dict(start.file.metadata)
    for path in trained:
        checkpoint = load_checkpoint(path)
        for name, weight in _added(checkpoint, start).items():
            if name in merged and not _equal(merged[name], weight):
                raise EasyRefError(
                    f"{escaped(str(path))} and another of the adapters to merge hold different "
                    f"weights of {escaped(name)}. Merge only one of them."
                )
            merged[name] = weight
        for key, value in checkpoint.file.metadata.items():
            if metadata.setdefault(key, value) != value:
                raise EasyRefError(
                    f"{escaped(str(path))} says {escaped(key)} {shown(value)}, the adapters before "
                    f"it say {shown(metadata[key])}. {_REMEDY}"
                )
    save_weights(merged, to, metadata)
    return to


def _added(checkpoint: AdapterCheckpoint, base: AdapterCheckpoint) -> dict[str, torch.Tensor]:
    """The weights that an adapter has beside those of the base, by official name.

    Raises:
        EasyRefError: it lacks one of the base's, or has another there.
    """
    names, shared = official_weights(checkpoint), official_weights(base)
    refused = (
        f"{escaped(str(checkpoint.path))} was not trained from {escaped(str(base.path))} alone"
    )
    missing = sorted(shared.keys() - names.keys())
    if missing:
        raise EasyRefError(f"{refused}: it lacks {escaped(missing[0])}. {_REMEDY}")
    with checkpoint.file.open() as get, base.file.open() as get_base:
        for name, source in shared.items():
            if not _equal(get(names[name]), get_base(source)):
                raise EasyRefError(f"{refused}: its {escaped(name)} differs. {_REMEDY}")
        new = {name: source for name, source in names.items() if name not in shared}
        others = sorted(name for name in new if part_of(name) not in _NEW_PARTS)
        if others:
            raise EasyRefError(
                f"{refused}: it adds {escaped(others[0])}, without which the other parts were "
                f"trained. {_REMEDY}"
            )
        return {name: get(source) for name, source in new.items()}


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
