"""The tokenizer of a Qwen2-VL directory, loaded by transformers from these files alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import EasyRefError
from ..untrusted import check_regular, escaped, is_regular, one_line, read_json, shown

# Whatever transformers may open for a tokenizer.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "config.json",
)
_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_MAX_BYTES = 64_000_000  # Qwen2-VL's tokenizer.json has 7 million
_AGAIN = "Download its files again."


def load_tokenizer(directory: str | Path) -> Any:
    """A transformers tokenizer, from the directory's own files, without running code from there.

    Raises:
        EasyRefError: no tokenizer files there, one that is no regular file or too large, another
            kind of tokenizer, or files that transformers cannot read.
    """
    directory = Path(directory)
    name = escaped(str(directory))
    if not (is_regular(directory / "tokenizer.json") or is_regular(directory / "vocab.json")):
        raise EasyRefError(
            f"There is no tokenizer in {name} (tokenizer.json, or vocab.json and merges.txt). Copy "
            "all files of the Qwen2-VL-2B-Instruct download there."
        )
    for file in (directory / name for name in _FILES):
        if os.path.exists(file):  # a broken link is nothing, as to transformers
            size = check_regular(file, "tokenizer file").st_size
            if size > _MAX_BYTES:
                raise EasyRefError(
                    f"{escaped(str(file))} has {size:,} bytes, too many for Qwen2-VL's tokenizer. "
                    f"{_AGAIN}"
                )
    _check_settings(directory / "tokenizer_config.json")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises anything from KeyError to bare Exception
        raise EasyRefError(
            f"The tokenizer in {name} cannot be read ({type(error).__name__}: {one_line(error)}). "
            f"{_AGAIN}"
        ) from error


def _check_settings(path: Path) -> None:
    """Raise EasyRefError where a tokenizer_config.json names another class or more files."""
    settings = read_json(path, what="tokenizer configuration") if is_regular(path) else {}
    if not isinstance(settings, dict):
        raise EasyRefError(f"{escaped(str(path))} holds no settings. {_AGAIN}")
    kind = settings.get("tokenizer_class")
    if kind is not None and kind not in _CLASSES:
        raise EasyRefError(
            f"{escaped(str(path))} names a tokenizer of class {shown(kind)}; Qwen2-VL's is "
            f"{_CLASSES[0]}. {_AGAIN}"
        )
    if settings.get("fast_tokenizer_files"):
        raise EasyRefError(
            f"{escaped(str(path))} names further files (fast_tokenizer_files), which Qwen2-VL's "
            f"tokenizer does not have. {_AGAIN}"
        )
