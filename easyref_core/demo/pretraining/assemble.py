"""Puts the trained parts together into the model set that is shipped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ...errors import EasyRefError
from ...training.export import write_whole
from ..tiny import SET_FILE
from ..tiny_weights import write_json, write_tensors
from .pictures import SIDE
from .references import IMAGE_SIZE
from .words import STORED_IDS, TABLE, used_ids

_TOKENIZER = (
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
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def assemble_set(work: Path, adapter: Path, to: Path) -> int:
    """Write the set of all parts under `work` into `to`, in float16.

    The adapter carries the MLLM, so `mllm/` gets only its settings and tokenizer; the text
    encoders keep only the words that captions use.

    Returns:
        Bytes of all safetensors files.

    Raises:
        EasyRefError: a part is missing.
    """
    base, vae, control = (work / part / "model" for part in ("base", "decoder", "controlnet"))
    judge = work / "judge" / "judge.safetensors"
    needed = (base / "unet", vae, control, judge, adapter)
    for part in needed:
        if not part.exists():
            raise EasyRefError(f"{part} is missing: train all parts first.")
    to.mkdir(parents=True, exist_ok=True)
    (to / SET_FILE).unlink(missing_ok=True)
    for source, name in ((base / "unet", "unet"), (vae, "vae"), (control, "controlnet")):
        _copy_half(source, to / name)
    for source, name in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        _cut_down(base / source, to / "text_encoders" / name)
    (to / "mllm").mkdir(exist_ok=True)
    for name in _TOKENIZER:
        shutil.copyfile(work / "mllm" / "model" / name, to / "mllm" / name)
    with safe_open(adapter, "pt") as file:
        metadata = file.metadata() or {}
    write_tensors(to / "easyref.safetensors", load_file(adapter), torch.float16, metadata)
    shutil.copyfile(judge, to / judge.name)
    files = sorted(to.rglob("*.safetensors"))
    info: dict[str, Any] = {
        "trained": True,
        "image_size": IMAGE_SIZE,
        "side": SIDE,
        "note": "Small models trained on drawn characters, to try EasyRef out.",
    }
    write_json(to / SET_FILE, info)
    return sum(file.stat().st_size for file in files)


def _copy_half(source: Path, to: Path) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # a folder of the computer it was trained on
    if "decoder_block_out_channels" in config:
        config.pop("block_out_channels", None)  # diffusers writes it, and warns on reading it
    write_json(to / "config.json", config)
    write_tensors(to / _WEIGHTS, load_file(source / _WEIGHTS), torch.float16)


def _cut_down(source: Path, to: Path) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    weights = load_file(source / "model.safetensors")
    ids = used_ids()
    unknown = next(n for n in range(len(weights[TABLE])) if n not in set(ids.tolist()))
    weights[TABLE] = weights[TABLE][torch.cat((ids, torch.tensor([unknown])))]
    halves = {name: weight.half() for name, weight in weights.items()}
    write_json(to / "config.json", config)
    write_whole(halves | {STORED_IDS: ids.int()}, to / "model.safetensors")
