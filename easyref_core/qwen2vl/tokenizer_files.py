"""The tokenizer of a model directory, loaded by transformers from these files alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
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
_ANY = ("PreTrainedTokenizerFast", "TokenizersBackend")
_MAX_BYTES = 64_000_000  # Qwen2-VL's tokenizer.json has 7 million
_AGAIN = "Download its files again."


@dataclass(frozen=True)
class TokenizerKind:
    """The tokenizer of a family of models.

    Attributes:
        family, download: for messages.
        classes: of transformers; the first is the usual one.
    """

    family: str
    download: str
    classes: tuple[str, ...]


QWEN2_VL = TokenizerKind(
    "Qwen2-VL", "Qwen2-VL-2B-Instruct", ("Qwen2Tokenizer", "Qwen2TokenizerFast", *_ANY)
)


def load_tokenizer(directory: str | Path, kind: TokenizerKind = QWEN2_VL) -> Any:
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
            f"all files of the {kind.download} download there."
        )
    for file in (directory / name for name in _FILES):
        if os.path.exists(file):  # a broken link is nothing, as to transformers
            size = check_regular(file, "tokenizer file").st_size
            if size > _MAX_BYTES:
                raise EasyRefError(
                    f"{escaped(str(file))} has {size:,} bytes, too many for {kind.family}'s "
                    f"tokenizer. {_AGAIN}"
                )
    _check_settings(directory / "tokenizer_config.json", kind)
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


def _check_settings(path: Path, kind: TokenizerKind) -> None:
    """Raise EasyRefError where a tokenizer_config.json names another class or more files."""
    settings = read_json(path, what="tokenizer configuration") if is_regular(path) else {}
    if not isinstance(settings, dict):
        raise EasyRefError(f"{escaped(str(path))} holds no settings. {_AGAIN}")
    found = settings.get("tokenizer_class")
    if found is not None and found not in kind.classes:
        raise EasyRefError(
            f"{escaped(str(path))} names a tokenizer of class {shown(found)}; {kind.family}'s is "
            f"{kind.classes[0]}. {_AGAIN}"
        )
    if settings.get("fast_tokenizer_files"):
        raise EasyRefError(
            f"{escaped(str(path))} names further files (fast_tokenizer_files), which "
            f"{kind.family}'s tokenizer does not have. {_AGAIN}"
        )
