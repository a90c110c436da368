"""The demo's model set in `demo/weights`, its `set.json`, and the references in `demo/references`.

unet/           diffusers UNet2DConditionModel
vae/            diffusers AutoencoderTiny
text_encoders/  clip_l/ and clip_g/, CLIP text models of transformers
controlnet/     diffusers ControlNetModel
score/          clip/ and dino/, models of transformers that know drawn pictures; may be absent
mllm/           Qwen2-VL directory
easyref.safetensors
set.json        {"trained": true, ...}

The large weights of the UNet, the autoencoder and the ControlNet are stored as int8 with one scale
per output channel; `read_stored_weights` reads them back. The adapter's are scaled fp8.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import EasyRefError
from .untrusted import escaped, read_json
from .weight_file import open_weight_file

SET_FILE = "set.json"
TRAINED_SET = Path(__file__).resolve().parents[1] / "demo" / "weights"
REFERENCES = TRAINED_SET.with_name("references")
_FIRST = "square"

# CLIP's token embedding has 49,408 rows; a set stores the rows of its captions' tokens, and one
# more that all other tokens share.
VOCABULARY = 49408
TABLE = "text_model.embeddings.token_embedding.weight"
STORED_IDS = "token_ids"  # stored beside a reduced table: the token id of each row
STORED_SCALE = ".scale"  # suffix of the scales [out, 1, ...] of an int8 weight [out, ...]


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


def reference_files() -> list[Path]:
    """Four shipped pictures of one character, all of one size.

    Raises:
        EasyRefError: they are missing.
    """
    files = sorted((REFERENCES / _FIRST).glob("[0-9].png"))
    if not files:
        raise EasyRefError(
            f"The demo's pictures are missing: there is none in {REFERENCES / _FIRST}. Install "
            "EasyRef again."
        )
    return files


def score_model(name: str) -> Path | None:
    """Directory of the set's own CLIP or DINO, for scores of drawn pictures; None without one."""
    directory = TRAINED_SET / "score" / name.lower()
    return directory if (directory / "config.json").is_file() else None


def read_set_info(directory: Path) -> dict[str, Any] | None:
    """Read the set's `set.json`; None where there is none or it is not readable JSON."""
    try:
        content = read_json(Path(directory) / SET_FILE)
    except EasyRefError:
        return None
    return content if isinstance(content, dict) else None


def rows_of_ids(ids: torch.Tensor) -> torch.Tensor:
    """[49408] row of each token id in a reduced table; the last row is for unknown tokens."""
    rows = torch.full((VOCABULARY,), len(ids))
    rows[ids] = torch.arange(len(ids))
    return rows


def read_stored_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a weight file of a set with the names, shapes and dtypes of its model class.

    Weights that are not stored in a set's own forms (int8 with scales, a reduced token embedding)
    are returned as they are.

    Raises:
        EasyRefError: see `open_weight_file`; scales or ids that do not fit the weights.
    """
    file = open_weight_file(path)
    try:
        return whole_table(dequantised(file.read({name: name for name in file.tensors})))
    except (KeyError, IndexError, RuntimeError) as error:
        raise EasyRefError(
            f"{escaped(str(path))} is not as a demo set stores weights "
            f"({escaped(str(error))[:200]}). Install EasyRef again."
        ) from error


def dequantised(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with each int8 weight multiplied by its scales, in float16.

    Raises:
        KeyError: an int8 weight has no scales.
    """
    weights = dict(state)
    for name, weight in state.items():
        if weight.dtype == torch.int8:
            weights[name] = (weight.float() * weights.pop(name + STORED_SCALE).float()).half()
    return weights


def whole_table(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text encoder's weights with all 49,408 rows; a whole table is left as it is."""
    weights = dict(state)
    ids = weights.pop(STORED_IDS, None)
    if ids is not None:
        weights[TABLE] = weights[TABLE][rows_of_ids(ids.long())]
    return weights
