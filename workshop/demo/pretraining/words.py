"""CLIP's tokenizer and vocabulary, cut down to the words that the captions use.

SDXL's text encoders have 49,408 token embeddings, of which captions of the drawn images use fewer
than a hundred. Those are trained and stored; all others share one row, "unknown".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..tiny_mllm import byte_symbols
from ..tiny_weights import write_json, write_text

START, END, LENGTH = 49406, 49407, 77

_EXCERPT = Path(__file__).with_name("clip_words.json")  # of CLIP's published vocabulary


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """(token -> CLIP's id, merges): all single bytes, and the tokens of the words."""
    excerpt = json.loads(_EXCERPT.read_text(encoding="utf-8"))
    # CLIP numbers printable bytes first, then the others.
    symbols = sorted(byte_symbols(), key=lambda symbol: (ord(symbol) > 255, ord(symbol)))
    ids = {symbol: number for number, symbol in enumerate(symbols)}
    ids |= {symbol + "</w>": 256 + number for number, symbol in enumerate(symbols)}
    ids |= excerpt["ids"] | {"<|startoftext|>": START, "<|endoftext|>": END}
    return ids, excerpt["merges"]


def used_ids() -> torch.Tensor:
    """[K] token ids with a row of their own: words, the comma, start, end and padding."""
    ids, _ = vocabulary()
    excerpt = json.loads(_EXCERPT.read_text(encoding="utf-8"))["ids"]
    used = {*excerpt.values(), ids["a</w>"], ids[",</w>"], START, END, 0}
    return torch.tensor(sorted(used))


def write_tokenizer(directory: Path, padding: str, ids: Mapping[str, int] | None = None) -> None:
    """Write a `CLIPTokenizer` directory for the captions' words.

    Args:
        ids: of the tokens of `vocabulary`; CLIP's own by default.
    """
    known, merges = vocabulary()
    write_json(directory / "vocab.json", known if ids is None else dict(ids))
    write_text(directory / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    end = "<|endoftext|>"
    settings: dict[str, Any] = {
        "bos_token": "<|startoftext|>",
        "do_lower_case": True,
        "eos_token": end,
        "model_max_length": LENGTH,
        "pad_token": padding,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": end,
    }
    write_json(directory / "tokenizer_config.json", settings)
