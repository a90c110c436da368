"""The metrics of a run, by the models that are named and found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...errors import EasyRefError
from ...untrusted import escaped, one_line, shown
from ...weight_file import weight_files
from . import Metric
from .embedders import CLIP, DINO, ClipEmbedder, PictureEmbedder, open_clip, open_dino
from .faces.identity import FaceIdentity
from .model_directory import MissingModelError, ModelKind
from .similarity import SimilarityMetric

# Without the weights of other frameworks, which lie beside them.
_FILES = ("*.json", "merges.txt", "model.safetensors", "model-*-of-*.safetensors")
_PICKLE = "pytorch_model.bin"  # where there is no other; nothing in it is run
_URL = "https://huggingface.co"


class _Hub:
    """Where models are fetched by name: the Hugging Face hub, or only its cache.

    Attributes:
        notes: at most one, that the hub cannot be reached.
    """

    def __init__(self, offline: bool) -> None:
        self._offline = offline
        self.notes: list[str] = []

    def directory(self, name: str, kind: ModelKind) -> Path:
        """The directory of a model, by its path or its name on the hub.

        Raises:
            MissingModelError: it is neither here nor to be had.
        """
        path = Path(name)
        if path.is_dir():
            return path
        if path.exists():
            raise EasyRefError(
                f"{escaped(name)} is a file; {kind.name} is a directory with config.json, "
                "preprocessor_config.json and model.safetensors. Name the directory."
            )
        if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
            raise MissingModelError(f"There is no directory {escaped(name)}.")
        folder = self._snapshot(name, _FILES)
        return folder if weight_files(folder) else self._snapshot(name, (*_FILES, _PICKLE))

    def _snapshot(self, name: str, files: tuple[str, ...]) -> Path:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

        given: dict[str, Any] = {"repo_id": name, "allow_patterns": list(files)}
        try:
            return Path(huggingface_hub.snapshot_download(**given, local_files_only=self._offline))
        except RepositoryNotFoundError:
            raise MissingModelError(f"The Hugging Face hub has no model {shown(name)}.") from None
        except LocalEntryNotFoundError:
            if not self._offline:
                self._unreachable("there is no connection")
        except Exception as error:  # any error of the network
            if self._offline:
                raise MissingModelError(f"{shown(name)}: {one_line(error)}.") from None
            self._unreachable(one_line(error))
            return self._snapshot(name, files)
        raise MissingModelError(f"{shown(name)} is not in the Hugging Face hub's cache.")

    def _unreachable(self, reason: str) -> None:
        self._offline = True
        self.notes.append(
            f"The Hugging Face hub cannot be reached ({reason}): only local directories and its "
            "cache are used."
        )


def load_metrics(
    clip: str = CLIP.example,
    dino: str = DINO.example,
    faces: str = "",
    offline: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[list[Metric], list[str]]:
    """The metrics whose models are there, on their device.

    Args:
        clip, dino: directories, or names on the Hugging Face hub; empty to leave one out.
        faces: face-api's folder of models; empty for no such metric.
        offline: use directories and the hub's cache only.

    Returns:
        (metrics, notes): a note for each model that is missing, with what to put where, and one if
        the hub cannot be reached.

    Raises:
        EasyRefError: a model that is there cannot be used: of another kind, damaged.
    """
    hub = _Hub(offline)
    metrics: list[Metric] = []
    missing: list[str] = []
    openers: tuple[tuple[ModelKind, str, str, Callable[..., PictureEmbedder]], ...] = (
        (CLIP, clip, "CLIP-I and CLIP-T are", open_clip),
        (DINO, dino, "DINO-I is", open_dino),
    )
    for kind, name, left_out, opener in openers:
        if not name:
            continue
        option = f"--{kind.name.lower()}"
        try:
            embedder = opener(hub.directory(name, kind), _short(name))
        except MissingModelError as error:
            missing.append(f"{left_out} left out. {error} {_what_to_do(kind)}")
        except EasyRefError as error:
            raise EasyRefError(f"{option}: {error}") from error
        else:
            metrics.append(SimilarityMetric(embedder.to(device)))
    if faces and not Path(faces).is_dir():
        missing.append(
            f"The identity of faces is left out. There is no directory {escaped(faces)}. Name the "
            'folder "model" of face-api with --faces.'
        )
    elif faces:
        try:
            metrics.append(FaceIdentity(faces, device))
        except EasyRefError as error:
            raise EasyRefError(f"--faces: {error}") from error
    return metrics, [*hub.notes, *missing]


def load_clip(name: str, offline: bool = False, device: torch.device | str = "cpu") -> ClipEmbedder:
    """CLIP alone, on its device.

    Raises:
        EasyRefError: it is missing, of another kind, or damaged.
    """
    hub = _Hub(offline)
    try:
        return open_clip(hub.directory(name, CLIP), _short(name)).to(device)
    except MissingModelError as error:
        raise EasyRefError(" ".join([*hub.notes, str(error), _what_to_do(CLIP)])) from error


def _what_to_do(kind: ModelKind) -> str:
    return (
        f"Put the files of {_URL}/{kind.example} (config.json, preprocessor_config.json, "
        f"model.safetensors{' and the tokenizer' if kind is CLIP else ''}) into a directory and "
        f"name it with --{kind.name.lower()}."
    )


def _short(name: str) -> str:
    """A model's name for tables: of a directory the last part, wherever it lies."""
    return Path(name).resolve().name if Path(name).is_dir() else name
