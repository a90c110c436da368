"""Copies pretrained parts of a model set into a work folder, so that only the rest is trained.

The stages start from them, as they do from downloaded models at real size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from safetensors import SafetensorError

from easyref_core.demo_set import read_set_info, read_stored_weights
from easyref_core.errors import EasyRefError

from ..evaluation.classifier import SHIPPED_CLASSIFIER
from ..stored_weights import WEIGHTS, load_stored
from ..tiny_weights import write_tensors, write_text
from .assemble import JUDGE, MLLM_SETTINGS, MLLM_WEIGHTS, PARTS_FILE
from .base import write_vae_and_scheduler
from .text_encoders import write_tokenizers

_COPIED = "taken.txt"  # in a copied part: digest of the files it was copied from
_UNET = f"unet/{WEIGHTS}"
_VAE = ("vae/config.json", f"vae/{WEIGHTS}")
_CLIP = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_FILES: Mapping[str, tuple[str, ...]] = {
    "vae": _VAE,
    "mllm": tuple(f"mllm/{name}" for name in (*MLLM_SETTINGS, MLLM_WEIGHTS)),
    "base": (
        *("unet/config.json", _UNET, *_VAE),
        *(f"text_encoders/{c}/{f}" for c in _CLIP for f in ("config.json", "model.safetensors")),
    ),
    "controlnet": ("controlnet/config.json", f"controlnet/{WEIGHTS}"),
    "judge": (JUDGE,),
    "decoder": _VAE,
}


def offered_parts(source: Path) -> tuple[str, ...]:
    """Pretrained parts in a model set, or in a folder with some parts of one.

    A whole set lacks the pretrained MLLM: its adapter holds the weights after the stages.

    Raises:
        EasyRefError: `source` is neither, or files are missing.
    """
    if (read_set_info(source) or {}).get("trained"):
        parts = tuple(part for part in _FILES if part != "mllm")
    else:
        try:
            listed = json.loads((source / PARTS_FILE).read_text(encoding="utf-8"))["parts"]
            parts = tuple(part for part in _FILES if part in listed)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EasyRefError(
                f"{source} is no trained model set, nor does it list parts of one in {PARTS_FILE} "
                f"({error}). Name a folder that the command `train --set` wrote."
            ) from error
    missing = sorted({n for part in parts for n in _FILES[part] if not _file(source, n).is_file()})
    if missing:
        raise EasyRefError(f"{source} lacks {', '.join(missing)}. Get it again.")
    return parts


def take_parts(source: Path, work: Path) -> tuple[str, ...]:
    """Copy the parts of `source` into a work folder, where the command `train` finds them trained.

    Parts that were copied from the same files before stay as they are.

    Returns:
        The parts that are now those of `source`.

    Raises:
        EasyRefError: see `offered_parts`; or the work folder holds other versions of these parts,
            which do not fit together. Nothing is changed then.
    """
    parts = offered_parts(source)
    digests = {part: _digest(source, part) for part in parts}
    new = [part for part in parts if not _is_copy(work / part, digests[part])]
    for part in new:
        if (work / part).exists():
            raise EasyRefError(
                f"{work / part} exists, and is not a copy from {source}. Parts of two trainings do "
                "not fit together: choose another --folder."
            )
    for part in new:
        unfinished = work / f"{part}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            _copy_part(part, source, unfinished)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise EasyRefError(
                f"The part {part} of {source} cannot be copied ({error}). Get it again."
            ) from error
        write_text(unfinished / _COPIED, digests[part])
        unfinished.rename(work / part)
    return parts


def _file(source: Path, name: str) -> Path:
    """A file of a part; a whole set's judge is in the repository, not in the set."""
    path = source / name
    whole = read_set_info(source) is not None
    return SHIPPED_CLASSIFIER if name == JUDGE and whole and not path.exists() else path


def _is_copy(folder: Path, digest: str) -> bool:
    path = folder / _COPIED
    return path.is_file() and path.read_text(encoding="utf-8") == digest


def _digest(source: Path, part: str) -> str:
    digest = hashlib.sha256()
    for name in _FILES[part]:
        digest.update(hashlib.sha256(_file(source, name).read_bytes()).digest())
    return digest.hexdigest()


def _copy_part(part: str, source: Path, to: Path) -> None:
    """Write a part's folder as its training does."""
    if part == "base":
        _copy_base(source, to / "model")
    else:
        _copy(source, _FILES[part], to if part == "judge" else to / "model")


def _copy_base(source: Path, to: Path) -> None:
    _copy(source, ("unet/config.json", _UNET), to / "unet")
    for clip, name in _CLIP.items():
        stored = source / "text_encoders" / clip
        _copy(stored, ("config.json",), to / name)
        weights = read_stored_weights(stored / "model.safetensors")
        write_tensors(to / name / "model.safetensors", weights, torch.float16)
    write_tokenizers(to)
    write_vae_and_scheduler(load_stored(AutoencoderTiny, source / "vae"), to)


def _copy(source: Path, names: tuple[str, ...], to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for name in names:
        target = to / Path(name).name
        if target.name == WEIGHTS:  # in a form that diffusers reads
            write_tensors(target, read_stored_weights(source / name), torch.float16)
        else:
            shutil.copyfile(_file(source, name), target)
