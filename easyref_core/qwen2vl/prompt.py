"""The MLLM's prompt: chat format, instruction, token ids.

Source: official training code and demo; the newline after the instruction matters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from ..errors import EasyRefError
from ..untrusted import escaped
from .tokenizer_files import load_tokenizer

INSTRUCTION = (
    "Visualize a scene that closely resembles the provided images, capturing the essence and "
    "details described in this prompt:\n"
)
SYSTEM = "You are a helpful assistant."

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
_SPECIAL = (IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD)


def chat_parts(num_images: int, prompt: str) -> list[str]:
    """The chat as plain texts and special tokens, one `<|image_pad|>` for each picture; joined,
    they are the prompt string."""
    parts = [IM_START, f"system\n{SYSTEM}", IM_END, "\n", IM_START, "user\n"]
    parts += [VISION_START, IMAGE_PAD, VISION_END] * num_images
    parts += [INSTRUCTION + prompt, IM_END, "\n", IM_START, "assistant\n"]
    return parts


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token ids of a chat.

    Attributes:
        ids: [L] int64, `<|image_pad|>` repeated for every image token.
        image_spans: (first, end) positions of each picture's tokens.
        prompt_span: (first, end) positions of the user's prompt.
    """

    ids: torch.Tensor
    image_spans: tuple[tuple[int, int], ...]
    prompt_span: tuple[int, int]

    def __len__(self) -> int:
        return self.ids.shape[0]


class PromptTokenizer:
    """Qwen2-VL's tokenizer; a special token spelled in the user's text stays text.

    Args:
        tokenizer: a transformers tokenizer.
        source: where it came from, for messages.

    Attributes:
        special_ids: of the chat's special tokens.

    Raises:
        EasyRefError: the special tokens of Qwen2-VL are not in its vocabulary.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._tokenizer = tokenizer
        self.source = escaped(source)
        added: dict[str, int] = dict(tokenizer.get_added_vocab())
        missing = [token for token in _SPECIAL if token not in added]
        if missing:
            raise EasyRefError(
                f"The tokenizer of {self.source} lacks {', '.join(missing)}; it is not "
                "Qwen2-VL's. Choose a Qwen2-VL-2B-Instruct directory with all its files."
            )
        self.special_ids = {token: added[token] for token in _SPECIAL}
        # Text that spells an added token is split after its first character, so that the
        # tokenizer gets plain text only.
        names = sorted(filter(None, added), key=len, reverse=True)
        self._split = re.compile(
            "|".join(f"{re.escape(n[0])}(?={re.escape(n[1:])})" for n in names)
        )

    @classmethod
    def from_directory(cls, directory: str | Path) -> PromptTokenizer:
        """Load the tokenizer of an MLLM directory through transformers, offline.

        Raises:
            EasyRefError: see `load_tokenizer`; the special tokens are missing.
        """
        return cls(load_tokenizer(directory), str(directory))

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text."""
        ids: list[int] = []
        start = 0
        for match in self._split.finditer(text):
            ids += self._encode(text[start : match.end()])
            start = match.end()
        return ids + self._encode(text[start:])

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def tokenize(self, image_tokens: Sequence[int], prompt: str) -> TokenizedPrompt:
        """Ids of the whole chat.

        Args:
            image_tokens: number of tokens of each picture.

        Raises:
            EasyRefError: the prompt holds half of a character, which no tokenizer accepts.
        """
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise EasyRefError(
                "The prompt holds half of a character (a lone surrogate, as in a broken emoji). "
                "Type that character again."
            )
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        prompt_span = (0, 0)
        remaining = iter(image_tokens)
        for part in chat_parts(len(image_tokens), prompt):
            if part == IMAGE_PAD:
                count = next(remaining)
                spans.append((len(ids), len(ids) + count))
                ids += [self.special_ids[IMAGE_PAD]] * count
            elif part in self.special_ids:
                ids.append(self.special_ids[part])
            else:
                text = self.text_ids(part)
                if part == INSTRUCTION + prompt:
                    # A token may span both, so the prompt starts where the ids first differ from
                    # the instruction's.
                    instruction = self.text_ids(INSTRUCTION)
                    pairs = zip(text, instruction, strict=False)
                    start = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
                    prompt_span = (len(ids) + start, len(ids) + len(text))
                ids += text
        return TokenizedPrompt(torch.tensor(ids, dtype=torch.int64), tuple(spans), prompt_span)
