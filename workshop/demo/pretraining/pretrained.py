"""Takes the pretrained parts that a model set holds, so that only what follows is trained.

They are what the stages build upon, as the models that a real user downloads are.
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

from easyref_core.demo_set import is_trained, read_stored_weights
from easyref_core.errors import EasyRefError

from ..readings import JUDGE_FILE
from ..stored_weights import WEIGHTS, load_stored
from ..tiny_weights import write_tensors, write_text
from .assemble import JUDGE, MLLM_SETTINGS, MLLM_WEIGHTS, PARTS_FILE
from .base import write_around, write_tokenizers

_TAKEN = "taken.txt"  # in a part that was taken: from which files
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
    """What of the pretraining a model set, or a folder with some of its parts, holds.

    A whole set has no weights of the pretrained MLLM: those in its adapter have been trained on.

    Raises:
        EasyRefError: neither of both, or files are missing.
    """
    if is_trained(source):
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
    """Put what `source` holds into a work folder, where the command `train` takes it for trained.

    Parts that were taken from the same files before stay as they are.

    Returns:
        The parts that are now those of `source`.

    Raises:
        EasyRefError: see `offered_parts`; or the work folder holds other ones of these parts, which
            do not fit each other. Then nothing is changed.
    """
    parts = offered_parts(source)
    marks = {part: _digest(source, part) for part in parts}
    new = [part for part in parts if not _was_taken(work / part, marks[part])]
    for part in new:
        if (work / part).exists():
            raise EasyRefError(
                f"{work / part} is there, and was not taken from what {source} holds. Parts of two "
                "trainings do not fit each other: choose another --folder."
            )
    for part in new:
        unfinished = work / f"{part}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            _take(part, source, unfinished)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise EasyRefError(
                f"The part {part} of {source} cannot be taken ({error}). Get it again."
            ) from error
        write_text(unfinished / _TAKEN, marks[part])
        unfinished.rename(work / part)
    return parts


def _file(source: Path, name: str) -> Path:
    """A file of a part; the judge of a whole set is the one that the repository keeps beside it."""
    path = source / name
    return JUDGE_FILE if name == JUDGE and not path.exists() and is_trained(source) else path


def _was_taken(folder: Path, mark: str) -> bool:
    path = folder / _TAKEN
    return path.is_file() and path.read_text(encoding="utf-8") == mark


def _digest(source: Path, part: str) -> str:
    digest = hashlib.sha256()
    for name in _FILES[part]:
        digest.update(hashlib.sha256(_file(source, name).read_bytes()).digest())
    return digest.hexdigest()


def _take(part: str, source: Path, to: Path) -> None:
    """A part's folder as its training leaves it."""
    if part == "base":
        _take_base(source, to / "model")
    else:
        _copy(source, _FILES[part], to if part == "judge" else to / "model")


def _take_base(source: Path, to: Path) -> None:
    _copy(source, ("unet/config.json", _UNET), to / "unet")
    for clip, name in _CLIP.items():
        kept = source / "text_encoders" / clip
        _copy(kept, ("config.json",), to / name)
        weights = read_stored_weights(kept / "model.safetensors")
        write_tensors(to / name / "model.safetensors", weights, torch.float16)
    write_tokenizers(to)
    write_around(load_stored(AutoencoderTiny, source / "vae"), to)


def _copy(source: Path, names: tuple[str, ...], to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for name in names:
        target = to / Path(name).name
        if target.name == WEIGHTS:  # diffusers reads them there
            write_tensors(target, read_stored_weights(source / name), torch.float16)
        else:
            shutil.copyfile(_file(source, name), target)
