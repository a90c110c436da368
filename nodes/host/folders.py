"""EasyRef's folders in ComfyUI, and file names that cannot lead out of them."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import folder_paths

from ...easyref_core.demo_set import score_model
from ...easyref_core.errors import EasyRefError
from ...easyref_core.evaluation.metrics.model_directory import ModelKind, family_of
from ...easyref_core.qwen2vl.config_file import is_qwen2_vl
from ...easyref_core.untrusted import escaped, is_regular, shown
from ...easyref_core.weight_file import with_shards
from ...easyref_core.weight_file.shards import index_of_shard
from .listing import Choices, Names, files_in, folders_in

ADAPTERS = "easyref"
TOKENS = "easyref_tokens"
MLLMS = "LLM"
SCORE_MODELS = "easyref_score"
FROM_ADAPTER = "from adapter"
NO_MODEL = "none"
DEMO_MODEL = "demo"

_ADAPTER_FILES = {".safetensors", ".sft", ".pt", ".pth", ".bin"}
_ADAPTER_INDEX = ".safetensors.index.json"
_TOKEN_FILES = {".safetensors"}
_OUTPUT_MARK = " [output]"
_MODEL_DEPTH = 3  # of the hub's cache
_LONGEST = 255  # of a file name in messages
_OF_PICTURES = ("%width%", "%height%")
# A date, the value of a node, or the size of a picture.
_PLACEHOLDER = re.compile(r"%date:[^%]*%|%[^%/\\.]+\.[^%/\\.]+%|%width%|%height%")


def register_folders() -> None:
    """Register models/easyref, models/easyref_tokens, models/LLM and models/easyref_score, beside
    the folders of extra_model_paths.yaml. The folder for adapters is created, so that users see
    where they go.
    """
    kinds = {ADAPTERS: _ADAPTER_FILES, TOKENS: _TOKEN_FILES, MLLMS: set(), SCORE_MODELS: set()}
    for name, extensions in kinds.items():
        folder = os.path.join(folder_paths.models_dir, name)
        folder_paths.add_model_folder_path(name, folder)
        paths, present = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (paths, set(present) | extensions)
    with contextlib.suppress(OSError):  # a read-only models folder: others may be registered
        os.makedirs(os.path.join(folder_paths.models_dir, ADAPTERS), exist_ok=True)


def adapter_names() -> Names:
    return _adapters().names()


def adapter_path(name: Any) -> Path:
    """Full path of an adapter chosen in the graph.

    Raises:
        EasyRefError: it is not in any of the folders searched (which are named).
    """
    path = _adapters().find(name)
    if path is None:
        raise EasyRefError(
            f"There is no adapter {shown(name, _LONGEST)} in {_searched(ADAPTERS)}. Put EasyRef's "
            "model.safetensors there (any file name will do) and refresh the page."
        )
    return path


def mllm_names() -> Names:
    return Names([FROM_ADAPTER, *_mllms().names()])


def mllm_path(name: Any) -> Path | None:
    """Directory of an MLLM chosen in the graph; None for the adapter's own.

    Raises:
        EasyRefError: it is not among the Qwen2-VL directories found.
    """
    if name == FROM_ADAPTER:
        return None
    directories = _mllms()
    directory = directories.find(name)
    if directory is None:
        raise EasyRefError(
            f"There is no Qwen2-VL directory {shown(name, _LONGEST)} in {_searched(MLLMS)} (found: "
            f"{directories}). Put the Qwen2-VL-2B-Instruct folder there, with its config.json, and "
            "refresh the page."
        )
    return directory


def score_model_names(kind: ModelKind) -> Names:
    """Directories with a model of this kind, then none, and the demo's where it is shipped."""
    demo = [DEMO_MODEL] if score_model(kind.name) is not None else []
    return Names([*_score_models(kind).names(), NO_MODEL, *demo])


def score_model_path(name: Any, kind: ModelKind) -> Path | None:
    """Directory of a model chosen in EasyRef Score; None for none.

    Raises:
        EasyRefError: it is not among the directories found.
    """
    if name == NO_MODEL:
        return None
    found = _score_models(kind)
    path = found.find(name) or (score_model(kind.name) if name == DEMO_MODEL else None)
    if path is None:
        raise EasyRefError(
            f"There is no {kind.name} directory {shown(name, _LONGEST)} in "
            f"{_searched(SCORE_MODELS)} (found: {found}). Put the folder of {kind.example} there, "
            "with its config.json, and refresh the page."
        )
    return path


def token_names() -> Names:
    """Token files in models/easyref_tokens, then those in ComfyUI's output folder."""
    return Names([*_tokens().names(), *_saved_tokens().names()])


def tokens_path(name: Any) -> Path:
    """Full path of a token file chosen in the graph.

    Raises:
        EasyRefError: it is not one of `token_names()`.
    """
    path = _tokens().find(name) or _saved_tokens().find(name)
    if path is None:
        raise EasyRefError(
            f"There are no saved tokens {shown(name, _LONGEST)} in {_searched(TOKENS)} or "
            f"{_output_tokens()}. Save some with EasyRef Save Tokens and refresh the page."
        )
    return path


def new_tokens_path(filename_prefix: str, to_output: bool) -> tuple[Path, str]:
    """(path of a new file, its subfolder in the chosen folder).

    Args:
        filename_prefix: with ComfyUI's %year%, %month%, %day%, %hour%, %minute% and %second%.

    Raises:
        EasyRefError: the prefix names no file, leads outside the folder, or cannot be written; it
            holds a placeholder that only the page fills in, or that only pictures have.
    """
    left = _PLACEHOLDER.search(filename_prefix)
    if left:
        raise EasyRefError(
            f"filename_prefix {shown(filename_prefix, _LONGEST)} cannot be used: {_why(left[0])}"
        )
    base = _output_tokens() if to_output else Path(folder_paths.get_folder_paths(TOKENS)[0])
    prefix = filename_prefix.replace("\\", "/").strip()
    path = Path(prefix)
    plain = path.name not in ("", "..") and not path.is_absolute() and not set(prefix) & set(":\0")
    if not plain or not (base / path).resolve().is_relative_to(base.resolve()):
        raise EasyRefError(
            f"filename_prefix {filename_prefix!r} cannot be used: it must name a file inside "
            f"{base}. Give a plain name, with / for subfolders."
        )
    try:
        base.mkdir(parents=True, exist_ok=True)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, str(base))
    except OSError as error:
        raise EasyRefError(
            f"filename_prefix {filename_prefix!r} cannot be used: {error}. Choose another one."
        ) from error
    return Path(folder) / f"{name}_{counter:05}_.safetensors", subfolder


def _why(placeholder: str) -> str:
    """Why a placeholder is still there, and what to do."""
    name = shown(placeholder, _LONGEST)
    if placeholder in _OF_PICTURES:
        return f"{name} is the size of a picture, which tokens do not have. Leave it out."
    if placeholder.startswith("%date:"):
        return (
            f"{name} is filled in by ComfyUI's page, through which this run did not come. Write "
            "%year%, %month%, %day%, %hour%, %minute% or %second%."
        )
    return (
        f"{name} is the value of a node, filled in by ComfyUI's page, which found none: "
        "%Node.input% needs a node of this title in the graph, and an input of this name on it."
    )


def file_stamps(path: Path | None) -> list[tuple[str, int, int, int, int]]:
    """(name, bytes, time of change, inode, time of the inode's change) of a file, of an index and
    its shards, or of all files of a folder.

    A file without them, such as a broken link, is left out; reading it gives the error.
    """
    if path is None:
        return []
    files = with_shards(path)
    with contextlib.suppress(OSError):
        files = sorted(path.iterdir()) if path.is_dir() else files
    stamps = []
    for file in files:
        with contextlib.suppress(OSError):
            stat = file.stat()
            times = (stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns)
            stamps.append((file.name, stat.st_size, *times))
    return stamps


def bundled_tokenizer() -> Path:
    """The Qwen tokenizer that ComfyUI ships for its own text encoders.

    Raises:
        EasyRefError: this ComfyUI has none.
    """
    import comfy.model_management

    comfy_folder = Path(comfy.model_management.__file__).parent
    directory = comfy_folder / "text_encoders" / "qwen25_tokenizer"
    if not (directory / "vocab.json").is_file():
        raise EasyRefError(
            "This ComfyUI ships no Qwen tokenizer. Choose a Qwen2-VL-2B-Instruct directory as "
            "mllm in EasyRef Loader; its tokenizer is used then."
        )
    return directory


def _output_tokens() -> Path:
    return Path(folder_paths.get_output_directory()) / TOKENS


def _searched(kind: str) -> str:
    return escaped(", ".join(folder_paths.get_folder_paths(kind)))


def _adapters() -> Choices[Path]:
    """Shards are left out where their index is, which stands for them."""
    found = files_in(folder_paths.get_folder_paths(ADAPTERS), (*_ADAPTER_FILES, _ADAPTER_INDEX))
    for name, path in list(found.items()):
        index = index_of_shard(path)
        if index is not None and is_regular(index):
            del found[name]
    return found


def _mllms() -> Choices[Path]:
    """Qwen2-VL directories at most three levels below models/LLM, as deep as the hub's cache."""
    found: Choices[Path] = Choices()
    for base in folder_paths.get_folder_paths(MLLMS):
        for name, directory in folders_in(base, _MODEL_DEPTH):
            if name not in found and is_qwen2_vl(directory):
                found[name] = directory
    return found


def _score_models(kind: ModelKind) -> Choices[Path]:
    """Directories of models/easyref_score whose config.json names a model of this kind."""
    found: Choices[Path] = Choices()
    for base in folder_paths.get_folder_paths(SCORE_MODELS):
        for name, directory in folders_in(base, _MODEL_DEPTH):
            if name not in found and family_of(directory) in kind.classes:
                found[name] = directory
    return found


def _tokens() -> Choices[Path]:
    return files_in(folder_paths.get_folder_paths(TOKENS), _TOKEN_FILES)


def _saved_tokens() -> Choices[Path]:
    """Those in the output folder, under names that say so."""
    saved = files_in([_output_tokens()], _TOKEN_FILES)
    return Choices({name + _OUTPUT_MARK: path for name, path in saved.items()})
