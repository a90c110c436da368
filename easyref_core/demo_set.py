"""The demo's model set, shipped in `demo/weights`: where it is, and what its `set.json` says.

unet/           diffusers UNet2DConditionModel
vae/            diffusers AutoencoderTiny
text_encoders/  clip_l/ and clip_g/, CLIP text models of transformers
controlnet/     diffusers ControlNetModel
mllm/           Qwen2-VL directory
easyref.safetensors
set.json        {"trained": true, "side": 128, ...}

The large weights of the UNet, the autoencoder and the ControlNet are stored as int8 with one scale
per output channel; `read_stored_weights` reads them back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .errors import EasyRefError

SET_FILE = "set.json"
TRAINED_SET = Path(__file__).resolve().parents[1] / "demo" / "weights"
_SIDE = 128  # of sets that do not say

# CLIP's word table has 49,408 rows; a set stores the rows of the words that its captions use, and
# one more that all other words share.
VOCABULARY = 49408
TABLE = "text_model.embeddings.token_embedding.weight"
STORED_IDS = "token_ids"  # beside a cut-down table: the token id of each row
STORED_SCALE = ".scale"  # suffix of the scales [out, 1, ...] beside an int8 weight [out, ...]


def shipped_set() -> Path:
    """The directory of the shipped set.

    Raises:
        EasyRefError: it is missing.
    """
    if not (TRAINED_SET / SET_FILE).is_file():
        raise EasyRefError(
            f"The demo models are missing: there is no {TRAINED_SET / SET_FILE}. Install EasyRef "
            "again."
        )
    return TRAINED_SET


def is_trained(directory: Path) -> bool:
    """Whether a set's pictures can be expected to show anything."""
    return bool((read_set_info(directory) or {}).get("trained"))


def picture_side(directory: Path) -> int:
    """Side of the square pictures a set is made for, in pixels."""
    return int((read_set_info(directory) or {}).get("side", _SIDE))


def read_set_info(directory: Path) -> dict[str, Any] | None:
    """Read the set's `set.json`; None where there is none or it is not readable JSON."""
    try:
        content = json.loads((Path(directory) / SET_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def rows_of_ids(ids: torch.Tensor) -> torch.Tensor:
    """[49408] row of each token id in a cut-down table; the last row is "unknown"."""
    rows = torch.full((VOCABULARY,), len(ids))
    rows[ids] = torch.arange(len(ids))
    return rows


def read_stored_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a model's safetensors file of a set, as its model class expects it.

    Files that store nothing in the set's own forms (int8 with scales, a cut-down word table) are
    returned as they are.

    Raises:
        OSError, SafetensorError: the file cannot be read.
        KeyError: an int8 weight without its scales.
    """
    return whole_table(dequantised(load_file(path)))


def dequantised(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with every int8 weight times its scales, in float16."""
    weights = dict(state)
    for name, weight in state.items():
        if weight.dtype == torch.int8:
            weights[name] = (weight.float() * weights.pop(name + STORED_SCALE).float()).half()
    return weights


def whole_table(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text encoder's weights with all 49,408 rows; a table that is whole stays as it is."""
    weights = dict(state)
    ids = weights.pop(STORED_IDS, None)
    if ids is not None:
        weights[TABLE] = weights[TABLE][rows_of_ids(ids.long())]
    return weights
