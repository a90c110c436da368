"""EasyRef's folders in ComfyUI, and file names that cannot lead out of them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ...easyref_core.errors import EasyRefError

ADAPTERS = "easyref"
TOKENS = "easyref_tokens"
MLLMS = "LLM"
FROM_ADAPTER = "from adapter"

_ADAPTER_FILES = {".safetensors", ".sft", ".pt", ".pth", ".bin"}
_TOKEN_FILES = {".safetensors"}
_OUTPUT_MARK = " [output]"
_MLLM_DEPTH = 3


def register_folders() -> None:
    """Register models/easyref, models/easyref_tokens and models/LLM, beside the folders of
    extra_model_paths.yaml. The folder for adapters is created, so that users see where they go.
    """
    for name, extensions in ((ADAPTERS, _ADAPTER_FILES), (TOKENS, _TOKEN_FILES), (MLLMS, set())):
        folder = os.path.join(folder_paths.models_dir, name)
        folder_paths.add_model_folder_path(name, folder)
        paths, present = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (paths, set(present) | extensions)
    with contextlib.suppress(OSError):  # a read-only models folder: others may be registered
        os.makedirs(os.path.join(folder_paths.models_dir, ADAPTERS), exist_ok=True)


def adapter_names() -> list[str]:
    return folder_paths.get_filename_list(ADAPTERS)


def adapter_path(name: str) -> Path:
    """Full path of an adapter chosen in the graph.

    Raises:
        EasyRefError: it is not in any of the folders searched (which are named).
    """
    path = folder_paths.get_full_path(ADAPTERS, name) if name in adapter_names() else None
    if path is None:
        raise EasyRefError(
            f"There is no adapter {name!r} in {_searched(ADAPTERS)}. Put EasyRef's "
            "model.safetensors there (any file name will do) and refresh the page."
        )
    return Path(path)


def mllm_directories() -> dict[str, Path]:
    """Name in the graph -> directory, of all Qwen2-VL directories under models/LLM."""
    directories: dict[str, Path] = {}
    for base in folder_paths.get_folder_paths(MLLMS):
        for directory in _walk(Path(base), _MLLM_DEPTH):
            name = directory.relative_to(base).as_posix()
            if name not in directories and _is_qwen2_vl(directory / "config.json"):
                directories[name] = directory
    return dict(sorted(directories.items()))


def mllm_path(name: str) -> Path | None:
    """Directory of an MLLM chosen in the graph; None for the adapter's own.

    Raises:
        EasyRefError: it is not among the Qwen2-VL directories found.
    """
    if name == FROM_ADAPTER:
        return None
    directories = mllm_directories()
    if name not in directories:
        raise EasyRefError(
            f"There is no Qwen2-VL directory {name!r} in {_searched(MLLMS)} (found: "
            f"{', '.join(directories) or 'none'}). Put the Qwen2-VL-2B-Instruct folder there, "
            "with its config.json, and refresh the page."
        )
    return directories[name]


def token_names() -> list[str]:
    """Token files in models/easyref_tokens, then those in ComfyUI's output folder."""
    saved = _output_tokens()
    outputs = [p.relative_to(saved).as_posix() for p in _token_files(saved)]
    return folder_paths.get_filename_list(TOKENS) + [n + _OUTPUT_MARK for n in sorted(outputs)]


def tokens_path(name: str) -> Path:
    """Full path of a token file chosen in the graph.

    Raises:
        EasyRefError: it is not one of `token_names()`.
    """
    if name in token_names():
        if name.endswith(_OUTPUT_MARK):
            return _output_tokens() / name.removesuffix(_OUTPUT_MARK)
        path = folder_paths.get_full_path(TOKENS, name)
        if path is not None:
            return Path(path)
    raise EasyRefError(
        f"There are no saved tokens {name!r} in {_searched(TOKENS)} or {_output_tokens()}. Save "
        "some with EasyRef Save Tokens and refresh the page."
    )


def new_tokens_path(filename_prefix: str, to_output: bool) -> tuple[Path, str]:
    """(path of a new file, its subfolder in the chosen folder).

    Raises:
        EasyRefError: the prefix names no file, leads outside the folder, or cannot be written.
    """
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


def file_stamps(path: Path | None) -> list[tuple[str, int, int]]:
    """(name, bytes, time of change) of a file, or of all files of a folder.

    A file without them, such as a broken link, is left out; reading it gives the error.
    """
    if path is None:
        return []
    stamps = []
    for file in sorted(path.iterdir()) if path.is_dir() else (path,):
        with contextlib.suppress(OSError):
            stat = file.stat()
            stamps.append((file.name, stat.st_size, stat.st_mtime_ns))
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
    return ", ".join(folder_paths.get_folder_paths(kind))


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    """Folders up to `depth` levels below `folder`; links are followed."""
    try:
        children = [c for c in sorted(folder.iterdir()) if c.is_dir() and c.name[0] != "."]
    except OSError:  # missing or unreadable; the nodes must load all the same
        return
    for child in children:
        yield child
        if depth > 1:
            yield from _walk(child, depth - 1)


def _token_files(folder: Path) -> Iterator[Path]:
    """Token files at any depth below `folder`; what cannot be read is skipped."""
    for base, _, names in os.walk(folder):
        files = (Path(base, name) for name in names)
        yield from (f for f in files if f.suffix in _TOKEN_FILES and os.path.isfile(f))


def _is_qwen2_vl(config: Path) -> bool:
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == "qwen2_vl"
    except (OSError, ValueError, AttributeError):
        return False
