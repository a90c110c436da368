"""Assembles the trained parts into the model set that is shipped.

Before all of them are trained, those that are can be written in the same layout; `pretrained` reads
both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from easyref_core.demo_set import SET_FILE, STORED_IDS, TABLE
from easyref_core.errors import EasyRefError
from easyref_core.training.disk import save_weights

from ..stored_weights import ADAPTER, WEIGHTS, copy_adapter, write_stored
from ..tiny_weights import write_json
from .pictures import SIDE
from .references import IMAGE_SIZE
from .words import used_ids

PARTS_FILE = "pretrained.json"  # {"parts": [...]}, in a folder with some parts only
JUDGE = "judge.safetensors"
MLLM_WEIGHTS = "model.safetensors"
MLLM_SETTINGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)


def assemble_set(work: Path, adapter: Path, to: Path) -> int:
    """Write the set of all parts under `work` into `to`.

    UNet, autoencoder and ControlNet are stored in int8, the adapter's large weights in fp8 (see
    `stored_weights`), the rest in float16.
    The judge is no part of a set: the repository has it in `workshop/demo/weights`. The adapter
    carries the MLLM, so `mllm/` has only its configuration and tokenizer; the text
    encoders keep only the embeddings of words that captions use.

    Returns:
        Bytes of all safetensors files.

    Raises:
        EasyRefError: a part is missing.
    """
    base, vae, control = (work / part / "model" for part in ("base", "decoder", "controlnet"))
    needed = (base / "unet", vae, control, adapter)
    for part in needed:
        if not part.exists():
            raise EasyRefError(f"{part} is missing: train all parts first.")
    _write_parts(work, ("decoder", "base", "controlnet"), to)
    _copy_mllm(work / "mllm" / "model", to / "mllm")
    copy_adapter(adapter, to / ADAPTER)
    info: dict[str, Any] = {
        "trained": True,
        "image_size": IMAGE_SIZE,
        "side": SIDE,
        "note": "Small models trained on drawn characters, to try EasyRef out.",
    }
    for unused in (to / "mllm" / MLLM_WEIGHTS, to / JUDGE):  # of an earlier set of some parts
        unused.unlink(missing_ok=True)
    write_json(to / SET_FILE, info)
    return _size(to)


def assemble_parts(work: Path, parts: Collection[str], to: Path) -> int:
    """Write some parts under `work` into `to`, laid out as in a set, and a list of them.

    With the part mllm, `mllm/` holds its weights too, as there is no adapter to carry them.

    Args:
        parts: of the pretraining, all of them trained.

    Returns:
        Bytes of all safetensors files.

    Raises:
        EasyRefError: no part at all, or a whole set is there already.
    """
    if not parts:
        raise EasyRefError(f"No part in {work} is trained yet, so there is nothing to write.")
    if (to / SET_FILE).exists():
        raise EasyRefError(
            f"{to} holds a whole model set, and {work} has only {', '.join(parts)} of one so far. "
            "Choose another folder for them."
        )
    _write_parts(work, parts, to)
    if "mllm" in parts:
        _copy_mllm(work / "mllm" / "model", to / "mllm")
        shutil.copyfile(work / "mllm" / "model" / MLLM_WEIGHTS, to / "mllm" / MLLM_WEIGHTS)
    write_json(to / PARTS_FILE, {"parts": [*parts]})
    return _size(to)


def _write_parts(work: Path, parts: Collection[str], to: Path) -> None:
    """Write all but the MLLM; what marks a set as whole is removed until all is written."""
    to.mkdir(parents=True, exist_ok=True)
    for name in (SET_FILE, PARTS_FILE):
        (to / name).unlink(missing_ok=True)
    if not {"vae", "decoder"}.isdisjoint(parts):
        vae = "decoder" if "decoder" in parts else "vae"
        _copy_stored(work / vae / "model", to / "vae")
    if "base" in parts:
        base = work / "base" / "model"
        _copy_stored(base / "unet", to / "unet")
        for source, name in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
            _cut_down(base / source, to / "text_encoders" / name)
    if "controlnet" in parts:
        _copy_stored(work / "controlnet" / "model", to / "controlnet")
    if "judge" in parts:
        shutil.copyfile(work / "judge" / JUDGE, to / JUDGE)


def _copy_mllm(source: Path, to: Path) -> None:
    """Copy configuration and tokenizer."""
    to.mkdir(exist_ok=True)
    for name in MLLM_SETTINGS:
        shutil.copyfile(source / name, to / name)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _copy_stored(source: Path, to: Path) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # a path of the computer it was trained on
    if "decoder_block_out_channels" in config:
        config.pop("block_out_channels", None)  # diffusers writes it, and warns when reading it
    write_json(to / "config.json", config)
    write_stored(to / WEIGHTS, load_file(source / WEIGHTS))


def _cut_down(source: Path, to: Path) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    weights = load_file(source / "model.safetensors")
    ids = used_ids()
    unknown = next(n for n in range(len(weights[TABLE])) if n not in set(ids.tolist()))
    weights[TABLE] = weights[TABLE][torch.cat((ids, torch.tensor([unknown])))]
    halves = {name: weight.half() for name, weight in weights.items()}
    write_json(to / "config.json", config)
    save_weights(halves | {STORED_IDS: ids.int()}, to / "model.safetensors")
