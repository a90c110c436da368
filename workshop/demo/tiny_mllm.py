"""Tiny random Qwen2-VL directory: configuration, weights, byte-level tokenizer, image settings.

The files and weight names are those of the Hugging Face repositories of Qwen2-VL, so whatever
reads a real directory reads this one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from .tiny_weights import RandomWeights, write_json, write_tensors, write_text

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Words that become one token each; everything else is spelled in smaller pieces down to bytes.
_WORDS = (
    *("system", "user", "assistant", "You", "Visualize", "helpful", "scene", "that", "closely"),
    *("resembles", "provided", "images", "capturing", "essence", "details", "described"),
    *("prompt", "are", "the", "and", "this", "with", "red", "blue", "green", "small", "large"),
)

# How Qwen2-VL cuts text into words before it looks for tokens inside them.
_WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_mllm(directory: Path, seed: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Write the whole directory.

    Returns:
        The configuration and the float32 weights by name; the adapter is built for them.
    """
    config = write_mllm_settings(directory)
    weights = mllm_weights(config, seed)
    write_tensors(directory / "model.safetensors", weights)
    return config, weights


def write_mllm_settings(
    directory: Path,
    words: Iterable[str] = (),
    sizes: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write everything but the weights: configuration, tokenizer and image settings.

    Args:
        words: that become one token each, beside those of EasyRef's own prompt.
        sizes, vision: entries of `config.json` and its `vision_config` that differ.

    Returns:
        The configuration.
    """
    vocabulary, merges = _vocabulary(dict.fromkeys((*_WORDS, *words)))
    special = {token: len(vocabulary) + index for index, token in enumerate(SPECIAL_TOKENS)}
    config = _model_config(special, len(vocabulary) + len(special)) | dict(sizes or {})
    config["vision_config"] |= {"hidden_size": config["hidden_size"], **(vision or {})}
    write_json(directory / "config.json", config)
    write_json(
        directory / "generation_config.json",
        {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]},
    )
    write_json(directory / "preprocessor_config.json", _image_config())
    _write_tokenizer(directory, vocabulary, merges, special)
    return config


def mllm_weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Random float32 weights of a Qwen2-VL with this configuration, by its original names.

    There is no `lm_head`: the configuration ties it to the word embeddings.
    """
    weights = RandomWeights("mllm", seed)
    vision, width = config["vision_config"], config["hidden_size"]
    patch = (vision["in_chans"], vision["temporal_patch_size"], *[vision["patch_size"]] * 2)
    vision_width = vision["embed_dim"]
    fan_in = patch[0] * patch[1] * patch[2] * patch[3]
    weights.normal("visual.patch_embed.proj.weight", (vision_width, *patch), fan_in**-0.5)
    for index in range(vision["depth"]):
        block = f"visual.blocks.{index}"
        inner = vision_width * vision["mlp_ratio"]
        weights.norm(f"{block}.norm1", vision_width)
        weights.norm(f"{block}.norm2", vision_width)
        weights.linear(f"{block}.attn.qkv", vision_width, 3 * vision_width)
        weights.linear(f"{block}.attn.proj", vision_width, vision_width)
        weights.linear(f"{block}.mlp.fc1", vision_width, inner)
        weights.linear(f"{block}.mlp.fc2", inner, vision_width)
    merged = vision_width * vision["spatial_merge_size"] ** 2
    weights.norm("visual.merger.ln_q", vision_width)
    weights.linear("visual.merger.mlp.0", merged, merged)
    weights.linear("visual.merger.mlp.2", merged, width)

    weights.normal("model.embed_tokens.weight", (config["vocab_size"], width), 1.0)
    head_width = width // config["num_attention_heads"]
    shared_width = head_width * config["num_key_value_heads"]
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        weights.norm(f"{layer}.input_layernorm", width, bias=False)
        weights.norm(f"{layer}.post_attention_layernorm", width, bias=False)
        # The gain sharpens attention; without it every token sees the same average of the rest.
        weights.linear(f"{layer}.self_attn.q_proj", width, width, gain=2.0)
        weights.linear(f"{layer}.self_attn.k_proj", width, shared_width)
        weights.linear(f"{layer}.self_attn.v_proj", width, shared_width)
        weights.linear(f"{layer}.self_attn.o_proj", width, width, bias=False)
        inner = config["intermediate_size"]
        weights.linear(f"{layer}.mlp.gate_proj", width, inner, bias=False)
        weights.linear(f"{layer}.mlp.up_proj", width, inner, bias=False)
        weights.linear(f"{layer}.mlp.down_proj", inner, width, bias=False)
    weights.norm("model.norm", width, bias=False)
    return weights.tensors


def _model_config(special: Mapping[str, int], tokens: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": special["<|endoftext|>"],
        "eos_token_id": special["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": 64,
        "image_token_id": special["<|image_pad|>"],
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 32768,
        "max_window_layers": 4,
        "model_type": "qwen2_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": special["<|video_pad|>"],
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "in_chans": 3,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": special["<|vision_end|>"],
        "vision_start_token_id": special["<|vision_start|>"],
        "vision_token_id": special["<|vision_pad|>"],
        "vocab_size": -(-tokens // 64) * 64,
    }


def _image_config() -> dict[str, Any]:
    return {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_pixels": 12845056,
        "merge_size": 2,
        "min_pixels": 3136,
        "patch_size": 14,
        "processor_class": "Qwen2VLProcessor",
        "temporal_patch_size": 2,
    }


def byte_symbols() -> list[str]:
    """The printable character that byte-level tokenizers write for each of the 256 bytes.

    Printable bytes of Latin-1 stand for themselves; the others take the characters from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _vocabulary(whole: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and merges: all bytes, then the pieces that build up the words.

    Merges are those of byte-pair encoding: join the most frequent pair, the first one found
    among equals, until every word, with and without a space before it, is a single token.
    """
    symbols = byte_symbols()
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    space = symbols[ord(" ")]
    words = [list(start + word) for word in whole for start in ("", space)]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in words for pair in pairwise(word)):
        pair = max(pairs, key=pairs.__getitem__)
        merges.append(pair)
        vocabulary.setdefault("".join(pair), len(vocabulary))
        words = [_join(word, pair) for word in words]
    return vocabulary, merges


def _join(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces of a word with every occurrence of a pair joined, from the left."""
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def _write_tokenizer(
    directory: Path,
    vocabulary: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    special: Mapping[str, int],
) -> None:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    lines = [f"{left} {right}" for left, right in merges]
    bytes_as_is = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    bytes_as_is["trim_offsets"] = False
    cut = {"type": "Split", "pattern": {"Regex": _WORD_PATTERN}}
    cut |= {"behavior": "Isolated", "invert": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **flags, "special": True}
            for token, number in special.items()
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, bytes_as_is]},
        "post_processor": bytes_as_is,
        "decoder": bytes_as_is,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocabulary),
            "merges": lines,
        },
    }
    end, padding = "<|im_end|>", "<|endoftext|>"
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(number): {"content": token, **flags, "special": True}
            for token, number in special.items()
        },
        "additional_special_tokens": list(special),
        "bos_token": None,
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": padding,
        "processor_class": "Qwen2VLProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    special_map = {
        "additional_special_tokens": list(special),
        "eos_token": {"content": end, **flags},
        "pad_token": {"content": padding, **flags},
    }
    write_json(directory / "tokenizer.json", tokenizer)
    write_json(directory / "tokenizer_config.json", settings)
    write_json(directory / "special_tokens_map.json", special_map)
    write_json(directory / "added_tokens.json", dict(special))
    write_json(directory / "chat_template.json", {"chat_template": _CHAT_TEMPLATE})
    write_json(directory / "vocab.json", dict(vocabulary))
    write_text(directory / "merges.txt", "\n".join(["#version: 0.2", *lines]) + "\n")
