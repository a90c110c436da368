"""Where EasyRef's files live in ComfyUI, and names that cannot leave those folders."""

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
    """Tell ComfyUI about models/easyref, models/easyref_tokens and models/LLM. Folders named in
    extra_model_paths.yaml are kept. The folder for adapters is made, so that it can be found.
    """
    for name, extensions in ((ADAPTERS, _ADAPTER_FILES), (TOKENS, _TOKEN_FILES), (MLLMS, set())):
        folder = os.path.join(folder_paths.models_dir, name)
        folder_paths.add_model_folder_path(name, folder)
        paths, known = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (paths, set(known) | extensions)
    with contextlib.suppress(OSError):  # where it cannot be made, other folders may serve
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
    """Name shown in the graph -> directory, for every Qwen2-VL directory under models/LLM."""
    found: dict[str, Path] = {}
    for base in folder_paths.get_folder_paths(MLLMS):
        for directory in _walk(Path(base), _MLLM_DEPTH):
            name = directory.relative_to(base).as_posix()
            if name not in found and _is_qwen2_vl(directory / "config.json"):
                found[name] = directory
    return dict(sorted(found.items()))


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
    """Saved tokens: those under models/easyref_tokens, then those ComfyUI saved to its output."""
    saved = _output_tokens()
    outputs = [p.relative_to(saved).as_posix() for p in _token_files(saved)]
    return folder_paths.get_filename_list(TOKENS) + [n + _OUTPUT_MARK for n in sorted(outputs)]


def tokens_path(name: str) -> Path:
    """Full path of a token file chosen in the graph.

    Raises:
        EasyRefError: it is not among the files listed, wherever its name points.
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
    """A file name that is still free, and the subfolder below the chosen folder.

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
    """What changes when a file, or one of a folder's files, does: name, bytes, time.

    What cannot be looked at, such as a link that leads nowhere, is left out; reading says what is
    wrong with it.
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
    """Folders below `folder`, links followed, so many levels deep."""
    try:
        children = [c for c in sorted(folder.iterdir()) if c.is_dir() and c.name[0] != "."]
    except OSError:  # not there, or not to be read: that shall not keep the nodes from loading
        return
    for child in children:
        yield child
        if depth > 1:
            yield from _walk(child, depth - 1)


def _token_files(folder: Path) -> Iterator[Path]:
    """Saved tokens at any depth below `folder`; what cannot be read is passed over."""
    for base, _, names in os.walk(folder):
        files = (Path(base, name) for name in names)
        yield from (f for f in files if f.suffix in _TOKEN_FILES and os.path.isfile(f))


def _is_qwen2_vl(config: Path) -> bool:
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == "qwen2_vl"
    except (OSError, ValueError, AttributeError):
        return False
